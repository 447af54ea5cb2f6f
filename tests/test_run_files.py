"""Files of a run: whole or not there, finite, readable after a kill."""

import os
import subprocess
import sys

import pytest

from saerl_cli.run.files import (
    append_jsonl,
    atomic_folder,
    read_json,
    read_jsonl,
    sha256_file,
    write_json,
    write_safetensors,
)


@pytest.mark.parametrize(
    "value, names",
    [
        ({"loss": float("nan")}, "loss is nan"),
        ({"a": {"b": [1.0, float("inf")]}}, "a.b: 1 is inf"),
        ([1.0, float("-inf")], "1 is -inf"),
    ],
)
def test_a_number_that_is_not_finite_is_refused_by_name_and_the_old_file_stays(tmp_path, value, names):
    file = tmp_path / "summary.json"
    write_json(file, {"loss": 1.0})
    with pytest.raises(ValueError, match=names):
        write_json(file, value)
    assert read_json(file) == {"loss": 1.0}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_a_torn_last_line_is_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    append_jsonl(file, {"step": 1})
    with file.open("a") as stream:
        stream.write('{"step": 2, "lo')
    assert read_jsonl(file) == [{"step": 1}]
    assert read_jsonl(tmp_path / "missing.jsonl") == []


def test_malformed_json_is_named(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json is malformed JSON"):
        read_json(tmp_path / "run.json")


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyError), atomic_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("x")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match="exists already"), atomic_folder(tmp_path / "a"):
        pass
    with atomic_folder(tmp_path / "a", replace=True) as folder:
        (folder / "y").write_text("2")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["y"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_safetensors_and_their_hash(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    file = tmp_path / "w.safetensors"
    write_safetensors(file, {"w": torch.arange(3.0)}, {"made": "here"})
    assert load_file(file)["w"].tolist() == [0.0, 1.0, 2.0]
    digest = subprocess.run(["sha256sum", str(file)], capture_output=True, text=True).stdout.split()[0]
    assert sha256_file(file) == digest


def test_a_kill_while_writing_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", 1)
    code = (
        "import os, json, signal, sys, pathlib; from saerl_cli.run import files;"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"
        "files.write_json(pathlib.Path(sys.argv[1]), 2)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.json")], env=os.environ)
    assert killed.returncode == -9
    assert read_json(tmp_path / "a.json") == 1
