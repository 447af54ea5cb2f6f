"""A model split over processes does what a whole one does, to the bit where nothing of it is trained."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import test_rl_job
from commands import TRUE
from conftest import TINY_WORDS
from rl_fixtures import build_trainer, tiny_sae
from shard_ranks import CASES, tiny_llama
from test_processes import LM, apart, same, text  # noqa: F401 (a fixture)

from saerl_cli.run import shards
from saerl_cli.run.directory import Run
from saerl_cli.run.files import read_json, read_jsonl

HERE = Path(__file__).parent
TWO = ("launch=cpu_2",)
SPLIT = ("launch=fsdp2", "launch.cpu=true", "launch.num_processes=2")
saes = test_rl_job.saes  # fixture
minutes = [pytest.mark.dist, pytest.mark.slow]


def test_alone_everything_is_left_as_it_is():
    import torch

    shards.barrier()
    tensor = torch.arange(3.0)
    assert shards.whole(tensor).equal(tensor) and shards.own(tensor) is tensor and not shards.is_part(tensor)
    assert shards.split_as(tensor, torch.zeros(3)) is tensor
    assert shards.on_cpu([("a", tensor)], wanted=False) == {}


REORDERED_NORM = {"parameters": 2e-6, "moments": 2e-6, "metrics": 3e-5}
"""How far two runs may be apart, metrics beyond 1 as a share of them, whose gradients' norms are sums of the same
n = 20,000 float32 numbers in different orders: by a share of sqrt(n) 2^-24 = 8e-6, whatever the processor's order is.

Clipping hands that share to all gradients of a step. Moments, of gradients below 0.1, follow: 8e-7. Adam divides by the
root of the mean square, so a step changes by twice the share at most, and 16 of them, which move a weight by 0.01, by
2e-7; rounding weights below 1 after each of them adds 16 x 2^-24 = 1e-6. Metrics are the norm itself, 8e-6, and
functions of such weights: their gradient, 10, times the distance of n weights of 0.1 that are rounded, sqrt(n) x 1e-8:
1.4e-5.
"""

# --- in two processes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each of two ranks of `shard_ranks.py` has found."""
    folder = tmp_path_factory.mktemp("ranks")
    build_trainer(folder)  # makes the files before two processes look for them
    tiny_llama(folder / "llama")
    env = os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
    ranks = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    subprocess.run([*ranks, str(HERE / "shard_ranks.py"), str(folder)], env=env, check=True, timeout=900)
    return json.loads((folder / "found.json").read_text())


class TestTwoRanks:
    pytestmark = minutes

    def test_passes_of_their_own(self, found):
        """Other numbers of passes, other models, other depths, and passes of one process alone."""
        for rank, numbers in enumerate(found):
            for family, seen in numbers["passes"].items():
                assert seen["equal"] and seen["split"] and seen["whole"], family
                assert seen["share"] == pytest.approx(0.5, abs=0.02)
                assert seen["upper_layers"] == (1, 0)[rank]  # one full pass through that model, in the first process

    def test_a_model_without_known_blocks(self, found):
        assert found[0]["strangers"].endswith("does not know the blocks of this architecture (gpt_neox); write"
                                              " launch.sharding=none")  # fmt: skip

    @pytest.mark.parametrize("case", CASES)
    def test_training(self, found, case):
        """To the bit, but for the norm of gradients that are split themselves, which is added up in another order."""
        allowed = REORDERED_NORM if case.startswith("full") else dict.fromkeys(REORDERED_NORM, 0)
        for numbers in (rank[case] for rank in found):
            assert numbers["moved"] > 1e-3
            assert numbers["rows"] and numbers["restored"]
            for what, most in allowed.items():
                assert numbers[what] <= most, what

    def test_what_is_replayed_is_not_gathered(self, found):
        """The lowest block is frozen: split, it runs in sampling and once a rollout; whole, it returns what is kept."""
        (cached, split), (again, plain) = (found[0][case]["lowest"] for case in ("coefficients", "no cache"))
        assert again == plain and split < cached / 2

    def test_whole_for_sampling_asks_nobody(self, found):
        at_once, other = found[0]["whole for sampling"], found[0]["coefficients"]
        assert at_once["turns"] == other["turns"] - 2 * (10 - 1)  # two phases of ten tokens


# --- the real commands -----------------------------------------------------------------------------------------------


def whole_and_split(saerl, *words: str) -> tuple[Path, Path]:
    """The run directories `whole` and `split` of a command in two processes."""
    for name, launch in (("whole", TWO), ("split", SPLIT)):
        done = saerl(*words, *launch, f"hydra.run.dir={name}")
        assert done.returncode == 0, done.stderr
    assert Run("split").record["num_processes"] == 2
    return Path("whole"), Path("split")


def files_of(run: Path) -> list[str]:
    return sorted(path.relative_to(run).as_posix() for path in run.rglob("*"))


class TestCommands:
    pytestmark = minutes

    def test_train_lm_and_its_resume(self, saerl, text):  # noqa: F811
        words = (*LM, "data=text", f"data.path={text}", "model.planted.batch_size=16")
        whole, split = whole_and_split(saerl, *words)
        assert files_of(whole) == files_of(split)
        assert (
            apart(whole, split) < 1e-5
        )  # 30 steps that move a weight by 0.1, times twice what the norm is off by: 2e-6
        same(*(read_jsonl(run / "metrics.jsonl") for run in (whole, split)), rel=1e-5)
        killed(("train-lm", *words[1:], *SPLIT), Path("killed"), lines=3)
        again = saerl(*words, *SPLIT, "hydra.run.dir=killed")
        assert again.returncode == 0, again.stderr
        assert read_jsonl(Path("killed/metrics.jsonl")) == read_jsonl(split / "metrics.jsonl")
        weights = [Path(run, "model/model.safetensors").read_bytes() for run in ("split", "killed")]
        assert weights[0] == weights[1]

    @pytest.mark.parametrize("more", [(), ("activations.cache=cache",), ("activations.outlier_norm=1.5",)])
    def test_train_sae_and_eval_sae(self, saerl, tiny_planted_model, empty_place, more):
        words = (
            "train-sae",
            *TINY_WORDS,
            "site=mlp_out.1",
            "sae.tokens=8192",
            "sae.batch_size=512",
            "eval_tokens=9000",
        )
        whole, split = whole_and_split(saerl, *words, "sweep=[{k:[4,8]}]", *more)
        for name in ("mlp_out.1-k_4", "mlp_out.1-k_8"):
            saved = [(run / "sae" / name / "sae_weights.safetensors").read_bytes() for run in (whole, split)]
            assert saved[0] == saved[1]
        same(*(read_json(run / "summary.json") for run in (whole, split)), rel=1e-9)
        if more:
            return
        measured = ("eval-sae", f"saes={whole}", "eval_tokens=9000", "probe_tokens=3000")
        for name, launch in (("one", TWO), ("two", SPLIT)):
            done = saerl(*measured, *launch, f"hydra.run.dir={name}")
            assert done.returncode == 0, done.stderr
        same(*(read_json(Path(run, "summary.json")) for run in ("one", "two")), rel=1e-9)

    @pytest.mark.parametrize("adapter", ["sparse_coeffs", "full"])
    def test_rlhf_its_resume_and_evaluate(self, saerl, saes, empty_place, adapter):
        tiny_sae(empty_place / "saes")
        words = (
            "rlhf", f"adapter={adapter}", *TINY_WORDS, "adapter.lr=3e-3", "algo.phases=4", "algo.rollouts=16",
            "algo.minibatches=2", "algo.epochs=2", "algo.max_new_tokens=8", "evaluation.samples=16", "snapshots=1",
            "evaluation.every=1", "evaluation.heldout_tokens=500", "checkpoint_every=1",
        )  # fmt: skip
        if adapter == "sparse_coeffs":
            words += (f"adapter.saes={empty_place / 'saes'}", "prompts.tokens=4")
        whole, split = whole_and_split(saerl, *words)
        assert files_of(whole) == files_of(split)
        records = [read_json(run / "run.json") for run in (whole, split)]
        for key in ("frozen_unchanged", "frozen_sha256", "frozen_tensors", "trainable", "inputs"):
            assert records[0][key] == records[1][key], key
        policy = "model/model.safetensors" if adapter == "full" else "adapter/adapter_model.safetensors"
        if adapter == "sparse_coeffs":
            for file in (policy, "samples.jsonl"):
                assert (whole / file).read_bytes() == (split / file).read_bytes()
            same(*(no_memory(read_json(run / "summary.json")) for run in (whole, split)), rel=1e-9)
        else:
            assert apart(whole, split) < 1e-4  # as `REORDERED_NORM`, at three times the learning rate
            assert read_json(whole / "model/config.json") == read_json(split / "model/config.json")
        killed((*words, *SPLIT), Path("killed"), lines=2)
        again = saerl(*words, *SPLIT, "hydra.run.dir=killed")
        assert again.returncode == 0, again.stderr
        for file in (policy, "samples.jsonl"):
            assert (split / file).read_bytes() == Path("killed", file).read_bytes()
        measured = ("evaluate", f"policy={split}", "snapshots=true", "base_samples=4", "factors=[0.5]")
        sizes = ("evaluation.samples=20", "evaluation.batch_size=8", "evaluation.heldout_tokens=1500")
        for name, launch in (("one", TWO), ("two", SPLIT)):
            done = saerl(*measured, *sizes, *launch, f"hydra.run.dir={name}")
            assert done.returncode == 0, done.stderr
        same(*(read_json(Path(run, "summary.json")) for run in ("one", "two")), rel=1e-9)
        assert Path("one/samples.jsonl").read_bytes() == Path("two/samples.jsonl").read_bytes()


def no_memory(summary: dict) -> dict:
    return {key: value for key, value in summary.items() if key != "peak_memory_bytes"}


def killed(words: tuple[str, ...], run: Path, lines: int) -> None:
    """Start a command, and kill it with all its processes once it has logged so often."""
    command = [*TRUE, *words, f"hydra.run.dir={run}"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if len(read_jsonl(run / "metrics.jsonl")) >= lines:
            break
        time.sleep(0.02)
    assert process.poll() is None, "it has ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1)  # workers in sessions of their own notice that their command is gone
