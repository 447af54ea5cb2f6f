"""Jobs in two processes: the same numbers as in one, files of the first alone, killed and resumed to the bit."""

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import test_rl_job
from commands import TRUE
from conftest import TINY_PLANTED, TINY_WORDS
from safetensors.torch import load_file

from saerl_cli.run.directory import Run
from saerl_cli.run.files import read_json, read_jsonl
from saerl_cli.run.processes import ONE_PROCESS

pytestmark = [pytest.mark.dist, pytest.mark.slow]
saes, finished = test_rl_job.saes, test_rl_job.finished  # fixtures
TIMED = ("second", "sha256", "path")


def numbers(tree: Any, name: str = "") -> dict[str, Any]:
    """Leaves of nested data by their dotted names, without what time and place decide."""
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, value in items for k, v in numbers(value, f"{name}.{key}").items()}
    return {} if any(word in name for word in TIMED) else {name: tree}


def same(one: Any, two: Any, rel: float) -> None:
    """Equal names; equal words, counts and flags; floats within a relative tolerance.

    Where nothing is trained, or to the bit, both have the same float32 numbers, of which they add up 1e5 at most in
    float64, in different orders: sqrt(1e5) 2^-53 = 4e-14, and 1e-9 where large sums cancel.
    """
    first, second = numbers(one), numbers(two)
    assert first.keys() == second.keys()
    for name, value in first.items():
        expected = pytest.approx(value, rel=rel, abs=1e-9) if isinstance(value, float) else value
        assert second[name] == expected, name


def apart(one: Path, two: Path) -> float:
    """The largest difference of a weight of two trained models, but for the keys' biases.

    Added to every key alike, they change no attention: their gradient is 0 but for rounding, out of which Adam makes
    steps as large as any, in a direction that the order of a sum decides.
    """
    first, second = (load_file(run / "model" / "model.safetensors") for run in (one, two))
    assert first.keys() == second.keys()
    heads = read_json(one / "model" / "config.json")["num_attention_heads"]
    differences = []
    for name, tensor in first.items():
        difference = (tensor - second[name]).abs()
        if name.endswith("query_key_value.bias"):
            difference = difference.view(heads, 3, -1)[:, [0, 2]]
        differences.append(difference.max().item())
    return max(differences)


def in_one_and_in_two(saerl: Any, *words: str) -> tuple[Path, Path]:
    """The run directories `one` and `two` of a command; all that two processes say, one of them said."""
    said = []
    for name, launch in (("one", "one"), ("two", "cpu_2")):
        done = saerl(*words, f"launch={launch}", "launch.cpu=true", f"hydra.run.dir={name}")
        assert done.returncode == 0, done.stderr
        said.append(len(done.stdout.splitlines()))
    assert said[0] == said[1]
    assert Run("two").record["num_processes"] == 2
    listed = [sorted(p.relative_to(name).as_posix() for p in Path(name).rglob("*")) for name in ("one", "two")]
    assert [*listed[0], "accelerate.yaml"] == [p for p in listed[1] if p != "accelerate.yaml"] + ["accelerate.yaml"]
    return Path("one"), Path("two")


# --- train-lm --------------------------------------------------------------------------------------------------------

LM = (
    "train-lm",
    *TINY_WORDS,
    "model.planted.steps=30",
    "model.planted.batch_size=15",
    "log_every=5",
    "checkpoint_every=5",
)


@pytest.fixture
def text(empty_place) -> str:
    """A file of the planted language's own reviews, about 40,000 words."""
    from saerl_cli.config.groups import PlantedConfig
    from saerl_cli.planted.documents import planted_documents

    reviews = planted_documents(PlantedConfig(**TINY_PLANTED | {"documents": 2500}), "train")
    Path("text.jsonl").write_text("".join(json.dumps({"text": review.text}) + "\n" for review in reviews))
    return "text.jsonl"


def test_train_lm(saerl, text):
    """Fifteen rows a step, eight for one process and seven for the other, which adds gradients up in another order.

    A mean over n = 15 x 64 tokens is then known to sqrt(n) 2^-24 = 2e-6 of its terms. Adam's 30 steps move a weight by
    0.1 at most; one whose gradient is a hundredth of its terms ends 0.1 x 2e-4 = 2e-5 apart, of which ten times is
    allowed. The loss, of which such a weight is a small part, is given 1e-4, and before the first step 1e-6 of itself.
    """
    one, two = in_one_and_in_two(saerl, *LM, "data=text", f"data.path={text}")
    assert apart(one, two) < 2e-4
    rows = [read_jsonl(run / "metrics.jsonl") for run in (one, two)]
    assert len(rows[0]) == 6
    same(*rows, rel=1e-4)
    assert rows[0][0]["loss"] == pytest.approx(rows[1][0]["loss"], rel=1e-6)
    same(*(read_json(run / "summary.json") for run in (one, two)), rel=1e-4)


def test_train_lm_of_the_planted_language_fills_the_cache_once(saerl, tmp_path):
    words = (*LM, "launch=cpu_2", "model.planted.steps=6")
    made = saerl(*words, "hydra.run.dir=made", SAERL_CACHE=str(tmp_path / "cache"))
    assert made.returncode == 0, made.stderr
    assert made.stderr.count("training the planted language model") == 1
    copied = saerl(*words, "hydra.run.dir=copied", SAERL_CACHE=str(tmp_path / "cache"))
    assert "in the cache already" in copied.stderr
    hashes = [read_json(Path(run, "summary.json"))["sha256"] for run in ("made", "copied")]
    assert hashes[0] == hashes[1]


def test_train_lm_goes_on_to_the_bit_where_a_rank_was_killed(saerl, text):
    words = (*LM, "data=text", f"data.path={text}", "launch=cpu_2")
    whole = saerl(*words, "hydra.run.dir=whole")
    assert whole.returncode == 0, whole.stderr
    command = [*TRUE, *words, "hydra.run.dir=killed"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not Path("killed/checkpoints/checkpoint-10").is_dir() and time.monotonic() < deadline:
            time.sleep(0.01)
        ranks = psutil.Process(process.pid).children(recursive=True)
        (victim,) = [rank for rank in ranks if rank.environ().get("RANK") == "1"]
        victim.send_signal(signal.SIGKILL)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.splitlines()[-1].startswith("saerl: rank 1 was killed by SIGKILL (out of memory, if nobody did it);")
    assert not psutil.wait_procs(ranks, timeout=5)[1]
    assert Run("killed").status == "failed"
    assert not Path("killed/model").exists()
    again = saerl(*words, "hydra.run.dir=killed")
    assert again.returncode == 0, again.stderr
    files = [Path(run, "model/model.safetensors").read_bytes() for run in ("whole", "killed")]
    assert files[0] == files[1]
    assert read_jsonl(Path("whole/metrics.jsonl")) == read_jsonl(Path("killed/metrics.jsonl"))


# --- train-sae -------------------------------------------------------------------------------------------------------


def test_train_sae_in_two_processes_goes_on_to_the_bit_where_it_was_killed(saerl, tiny_planted_model):
    """SIGKILL of the command with everything below it, between two checkpoints, twice."""
    words = (
        *("train-sae", *TINY_WORDS, "site=[mlp_out.1,resid_post.0]", "launch=cpu_2", "activations.buffer_tokens=1024"),
        *("sae.tokens=128000", "sae.batch_size=256", "sae.lr=1e-2", "sae.dead_after_tokens=2000"),
        *("sae.resample_every_tokens=2560", "eval_tokens=1500", "log_every=5", "checkpoint_every=10"),
    )
    whole = saerl(*words, "hydra.run.dir=whole")
    assert whole.returncode == 0, whole.stderr
    assert Run("whole").record["num_processes"] == 2
    for lines in (3, 40):
        command = [*TRUE, *words, "hydra.run.dir=killed"]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 240
            while len(read_jsonl(Path("killed/metrics.jsonl"))) < lines:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            below = psutil.Process(process.pid).children(recursive=True)
            for one in (psutil.Process(process.pid), *below):
                one.kill()
        assert len(below) == 3, "the launcher and two ranks"
    assert Run("killed").status == "running"
    again = saerl(*words, "hydra.run.dir=killed")
    assert again.returncode == 0, again.stderr
    assert "resuming at step" in again.stderr
    for site in ("mlp_out.1", "resid_post.0"):
        files = [Path(run, "sae", site, "sae_weights.safetensors").read_bytes() for run in ("whole", "killed")]
        assert files[0] == files[1], site
    assert Path("whole/metrics.jsonl").read_bytes() == Path("killed/metrics.jsonl").read_bytes()
    same(*(read_json(Path(run, "summary.json")) for run in ("whole", "killed")), rel=0)


# --- eval-sae --------------------------------------------------------------------------------------------------------


def test_eval_sae(saerl, text, tiny_planted_model):
    """Five chunks of text, three for one process and two for the other; controls and probes included."""
    from eval_sae_runs import SETTINGS, make_run

    make_run(Path("saes"), {"a": SETTINGS})
    Path("labelled.jsonl").write_text(
        "".join(json.dumps({"text": f"{word} film", "label": word}) + "\n" for word in ("good", "bad") * 60)
    )
    words = ("eval-sae", "saes=saes", "data=text", f"data.path={text}", "data.heldout=0.5", "data.context_size=64")
    controls = ("controls=true", "control_tokens=2048", "eval_tokens=36000", "probes=labelled.jsonl")
    one, two = in_one_and_in_two(saerl, *words, *controls)
    first, second = (read_json(run / "summary.json") for run in (one, two))
    assert first["saes"]["a"]["tokens_heldout"] > 3 * 8192
    same(first, second, rel=1e-9)
    rates = [load_file(run / "firing_rates.safetensors")["a"] for run in (one, two)]
    assert rates[0].equal(rates[1])


# --- evaluate --------------------------------------------------------------------------------------------------------


def test_evaluate(saerl, finished):
    """The same completions token for token, and with them all numbers."""
    words = ("evaluate", f"policy={finished.path}", "snapshots=true", "base_samples=5", "factors=[0.5]")
    sizes = ("evaluation.samples=44", "evaluation.batch_size=8", "evaluation.heldout_tokens=2000")
    one, two = in_one_and_in_two(saerl, *words, *sizes)
    for name in ("samples.jsonl", "base.jsonl"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    first, second = (read_json(run / "summary.json") for run in (one, two))
    assert len(first["frontier"]) == 4 and first["kl"] != 0
    same(first, second, rel=1e-9)


# --- one process -----------------------------------------------------------------------------------------------------


def test_alone_nothing_is_exchanged():
    import torch

    tensor = torch.ones(2)
    assert ONE_PROCESS.all_reduce(tensor) is tensor
    assert ONE_PROCESS.broadcast("x") == "x"
    assert ONE_PROCESS.map_batches(5, 2, lambda part: list(range(5))[part]) == [[0, 1], [2, 3], [4]]
