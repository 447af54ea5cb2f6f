"""Activations on disk: what is written, when it is used again, and the order it is served in."""

import itertools
import json
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from activation_fixtures import BOTH, HIGH, LOW, SPECIAL, Toy, ids, numbered_rows, toy_loaded, toy_stream

from saerl_cli.activations import CachedStream
from saerl_cli.activations import cache as cache_file
from saerl_cli.activations.cache import cached_activations, one_writer
from saerl_cli.config.activations import ActivationsConfig, CacheDtype
from saerl_cli.run.files import read_json

TOKENS = 350
CPU = torch.device("cpu")


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes the cache of the toy, forty rows of 9 a pass halved so that there are several passes."""
    monkeypatch.setattr("saerl_cli.activations.forward.FORWARD_TOKENS", 72)

    def written(model=None, rows=None, sites=BOTH, sha256="0", rank=0, world_size=1, barrier=lambda: None, **settings):
        loaded = toy_loaded(model, sha256)
        config = ActivationsConfig(cache=str(tmp_path / "cache"), **settings)
        rows = numbered_rows(TOKENS) if rows is None else rows
        return cached_activations(loaded, rows, sites, SPECIAL, config, rank, world_size, barrier)

    return written


def opened(folder, sites=BOTH, batch_size=16, buffer_tokens=64, **settings):
    return CachedStream(folder, sites, CPU, batch_size, buffer_tokens, **settings)


def served(stream, tokens):
    """So many tokens in the order of serving."""
    found = []
    while len(found) < tokens:
        found += ids(next(stream))
    return found[:tokens]


def broken():
    """A model that cannot be run."""
    model = Toy()
    model.forward = lambda **_: pytest.fail("the model was run")
    return model


# --- what is written -------------------------------------------------------------------------------------------------


def test_files_are_flat_and_described(write):
    folder = write()
    assert sorted(path.name for path in folder.iterdir()) == ["high.bin", "low.bin", "meta.json"]
    low = torch.frombuffer(bytearray((folder / "low.bin").read_bytes()), dtype=torch.float32).view(-1, 3)
    assert low[:, 0].tolist() == list(range(1, TOKENS + 1))
    meta = read_json(folder / "meta.json")
    assert meta["tokens"] == TOKENS
    assert meta["identity"]["modules"] == ["high", "low"]
    assert meta["sites"]["low"] == {
        "module": "low",
        "file": "low.bin",
        "width": 3,
        "mean": pytest.approx([(TOKENS + 1) / 2, 1, 0]),
        "mean_norm": pytest.approx(float(low.norm(dim=-1).double().mean())),
    }


def test_what_is_there_is_used_without_the_model(write, capfd):
    folder = write()
    assert "wrote 350 activations a site" in capfd.readouterr().err
    times = [path.stat().st_mtime_ns for path in sorted(folder.iterdir())]
    assert write(broken()) == folder
    assert "reading activations from" in capfd.readouterr().err
    assert [path.stat().st_mtime_ns for path in sorted(folder.iterdir())] == times
    assert served(opened(folder), 10)


def test_other_activations_have_another_folder(write):
    folders = [
        write(),
        write(rows=numbered_rows(TOKENS - 1)),
        write(sites=[LOW]),
        write(sha256="1"),
        write(cache_dtype=CacheDtype.bfloat16),
        write(rows=numbered_rows(TOKENS, 17)),
    ]
    assert len(set(folders)) == 6
    assert write(broken(), sites=BOTH[::-1]) == folders[0]


def test_bfloat16_halves_the_files(write):
    folder = write(cache_dtype=CacheDtype.bfloat16)
    assert (folder / "low.bin").stat().st_size == TOKENS * 3 * 2
    batch = next(opened(folder))
    exact = next(opened(write()))
    assert batch["low"].dtype == torch.bfloat16
    assert torch.equal(batch["low"], exact["low"].bfloat16())


def damage_size(folder):
    path = folder / "high.bin"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_size, "high.bin has 2799 bytes of 2800"),
        (lambda folder: (folder / "low.bin").unlink(), "No such file"),
        (lambda folder: (folder / "meta.json").write_text("{"), "malformed JSON"),
        (lambda folder: (folder / "meta.json").write_text("[]"), "damaged"),
        (lambda folder: (folder / "meta.json").write_text('{"identity": {}}'), "belongs to other activations"),
    ],
)
def test_a_damaged_folder_is_computed_again(write, capfd, damage, message):
    folder = write()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder)
    assert write() == folder
    assert message in capfd.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_cache_is_complete_or_absent(write, tmp_path):
    model = Toy()

    def fail(module, args, output):
        if model.passes == 3:
            raise RuntimeError("killed")

    model.low.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="killed"):
        write(model)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    (folder,) = [path.with_name(path.name[1:-5]) for path in (tmp_path / "cache").iterdir()]
    left = folder.with_name(f".{folder.name}.partial")  # of a process that could not clean up
    left.mkdir()
    (left / "low.bin").write_bytes(b"torn")
    assert write() == folder and not left.exists()
    assert sorted(served(opened(folder), TOKENS)) == list(range(1, TOKENS + 1))


def test_a_full_disk_leaves_nothing_behind(write, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="No space left on device"):
        write(broken())
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_activations_that_are_not_finite_are_not_kept(write, tmp_path):
    model = Toy()
    model.embed.weight.data[100, 1] = float("nan")
    with pytest.raises(ValueError, match="rows 8 to 15 of the text: activations at low are NaN or infinite"):
        write(model)
    assert not [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]


def test_a_cache_above_its_limit_is_refused(write, tmp_path):
    message = r"would take 7e-06 GB, more than activations.cache_gb=6e-06; .*cache_dtype=bfloat16, raise"
    with pytest.raises(ValueError, match=message):
        write(broken(), cache_gb=6e-6)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]
    assert write(cache_gb=8e-6).is_dir()


def test_a_cache_above_the_free_space_is_refused(write, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5000))
    with pytest.raises(ValueError, match=r"would take 7e-06 GB, and .*cache has 5e-06 GB free; .*another folder"):
        write(broken())
    assert write(cache_dtype=CacheDtype.bfloat16).is_dir()


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_write_together(write, world_size):
    folder = write()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)
    barrier, found, models = threading.Barrier(world_size, timeout=30), [], [Toy() for _ in range(world_size)]

    def work(rank):
        found.append(write(models[rank], rank=rank, world_size=world_size, barrier=barrier.wait))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [folder] * world_size
    assert all(0 < model.passes < 6 for model in models)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_second_run_waits_for_the_first(write, capfd):
    folder = write()
    shutil.rmtree(folder)
    second, found = threading.Thread(target=lambda: found.append(write())), []
    with one_writer(folder):
        second.start()
        second.join(0.3)
        assert not found and not folder.exists()
    second.join(10)
    assert found == [folder]
    assert "waiting for another run" in capfd.readouterr().err


# --- the order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "buffer_tokens"), [(16, 64), (35, 35), (7, 1000), (350, 350), (10, 90)])
def test_every_token_once_an_epoch_in_an_order_of_its_own(write, batch_size, buffer_tokens):
    folder = write()
    stream = opened(folder, batch_size=batch_size, buffer_tokens=buffer_tokens)
    order = served(stream, 4 * TOKENS)
    epochs = [order[i : i + TOKENS] for i in range(0, 4 * TOKENS, TOKENS)]
    assert all(sorted(epoch) == list(range(1, TOKENS + 1)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    again = served(opened(folder, batch_size=batch_size, buffer_tokens=buffer_tokens), 4 * TOKENS)
    assert again == order
    assert served(opened(folder, batch_size=batch_size, buffer_tokens=buffer_tokens, seed=1), TOKENS) != epochs[0]


def test_a_buffer_mixes_all_of_the_text(write):
    """Tokens that are neighbours in the text are no more so in a batch than chance has it."""
    first = served(opened(write(), buffer_tokens=64), 64)
    assert max(first) > 250 and min(first) < 100
    neighbours = sum(abs(a - b) == 1 for a, b in itertools.pairwise(first))
    assert neighbours < 12


def test_blocks_are_read_whole(write, monkeypatch):
    monkeypatch.setattr(cache_file, "BLOCK_TOKENS", 8)
    stream = opened(write(), batch_size=64, buffer_tokens=64 * 8)
    assert stream.block == 8
    assert sorted(served(stream, TOKENS)) == list(range(1, TOKENS + 1))
    rows = [stream._runs(0, first, 8) for first in range(0, 336, 8)]
    assert max(map(len, rows)) == 2  # a block, or what two blocks share behind the short one


def test_a_cached_stream_serves_what_a_plain_one_does(write):
    plain = toy_stream(rows=numbered_rows(352), batch_size=44, buffer_tokens=352)
    cached = opened(write(rows=numbered_rows(352)), batch_size=44, buffer_tokens=352)
    rows = [
        sorted(torch.cat([torch.cat([b["low"], b["high"]], 1) for b in itertools.islice(s, 8)]).tolist())
        for s in (plain, cached)
    ]
    assert rows[0] == rows[1]


def test_outliers_are_measured_alike(write):
    model = Toy()
    model.embed.weight.data[[5, 300], 2] = 1e6
    rows = numbered_rows(352)
    plain = toy_stream(model, rows, batch_size=44, buffer_tokens=352, outlier_norm=3.0)
    cached = opened(write(model, rows), batch_size=44, buffer_tokens=352, outlier_norm=3.0)
    found = [sorted(itertools.chain(*map(ids, itertools.islice(s, 8)))) for s in (plain, cached)]
    assert found[0] == found[1]
    assert plain.dropped == cached.dropped == 352 - len(found[0]) > 2
    assert plain._limits == cached._limits


def test_the_state_is_small(write):
    stream = opened(write())
    served(stream, 100)
    assert json.loads(json.dumps(stream.state())) == {"fill": 1, "step": 3, "cursor": {}}


def test_fewer_tokens_than_a_batch_are_refused(write):
    with pytest.raises(ValueError, match="the text holds 350 tokens, less than one batch of sae.batch_size=351"):
        opened(write(), batch_size=351)


def test_a_site_is_found_by_its_module(write):
    folder = write()
    other = type(HIGH)("alias", "high", None, "module", 2)
    assert next(opened(folder, [other]))["alias"].shape == (16, 2)
