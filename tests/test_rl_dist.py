"""Two processes: the same learning as in one, and the real command killed and resumed to the bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import TRUE
from conftest import TINY_WORDS
from rl_fixtures import build_trainer, tiny_sae
from rl_ranks import CASES
from safetensors.torch import load_file

pytestmark = [pytest.mark.dist, pytest.mark.slow]
HERE = Path(__file__).parent
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
WORDS = [
    "rlhf", "--sparse-coeffs", *TINY_WORDS, "adapter.lr=5e-2", "algo.phases=8", "algo.rollouts=16",
    "algo.minibatches=2", "algo.epochs=2", "algo.max_new_tokens=8", "evaluation.samples=16", "evaluation.every=2",
    "evaluation.heldout_tokens=500", "checkpoint_every=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> dict[str, Path]:
    """What `rl_ranks.py` has learned, all cases in one process and all in two."""
    env = os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
    folders = {}
    for name, launcher in (("one", []), ("two", TORCHRUN)):
        folders[name] = tmp_path_factory.mktemp(name)
        build_trainer(folders[name])  # makes model and SAE before two processes look for them
        command = [sys.executable, *launcher, str(HERE / "rl_ranks.py"), str(folders[name])]
        subprocess.run(command, env=env, check=True, timeout=900)
    return folders


@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_learns(learned, case):
    """A batch split in two is added up in another order, and its products are taken in blocks of another size.

    The first phase's numbers come from equal weights: sums of n = 200 float32 (16 completions of 10 tokens, through
    products of width 32 and 64) differ by about sqrt(n) 2^-24 = 1e-6 of their terms, of which ten times is allowed.
    After that Adam makes steps of the learning rate, 5e-2, out of gradients of any size: one that is a hundredth of its
    terms is known to 1e-4, and nine such steps end 9 x 5e-2 x 1e-4 = 5e-5 apart. Seen: 2e-6 at most, in AVX-512,
    AVX2 and SSE alike.
    """
    one, two = (load_file(folder / case / "learned.safetensors") for folder in learned.values())
    for name, tensor in one.items():
        assert (tensor - two[name]).abs().max() < 2e-4, name
    first, second = (json.loads((folder / case / "rows.json").read_text()) for folder in learned.values())
    for phase, (a, b) in enumerate(zip(first, second, strict=True)):
        close = {"rel": 1e-3, "abs": 1e-5} if phase else {"rel": 1e-5, "abs": 1e-6}
        for key in a.keys() - {"seconds", "tokens_per_second", "samples_per_second"}:
            assert a[key] == pytest.approx(b[key], **close), f"phase {phase}: {key}"
    assert first[-1].get("kl", 1) != 0 and first[-1]["grad_norm"] > 0


def test_two_processes_with_the_cache_are_two_without_it(learned):
    files = [learned["two"] / case / "learned.safetensors" for case in ("ppo", "ppo without the cache")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(("launch", "algo"), [("one", "grpo"), ("cpu_2", "ppo")])
def test_killed_at_any_moment_and_started_again(saerl, tiny_planted_model, empty_place, launch, algo):
    tiny_sae(empty_place / "saes")
    words = [
        *WORDS,
        f"algo={algo}",
        "algo.group=4",
        f"adapter.saes={empty_place / 'saes'}",
        f"launch={launch}",
        "launch.cpu=true",
    ]
    whole = saerl(*words, "hydra.run.dir=whole")
    assert whole.returncode == 0, whole.stderr
    record = json.loads((empty_place / "whole" / "run.json").read_text())
    assert record["status"] == "completed" and record["frozen_unchanged"] is True
    assert record["num_processes"] == (2 if launch == "cpu_2" else 1)
    metrics = empty_place / "killed" / "metrics.jsonl"
    for phases in (1, 5):
        command = [*TRUE, *words, "hydra.run.dir=killed"]
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.is_file() and len(metrics.read_text().splitlines()) >= phases:
                break
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(1)  # workers in sessions of their own notice that their command is gone
    again = saerl(*words, "hydra.run.dir=killed")
    assert again.returncode == 0, again.stderr
    for name in ("adapter/adapter_model.safetensors", "samples.jsonl"):
        assert (empty_place / "whole" / name).read_bytes() == (empty_place / "killed" / name).read_bytes(), name
    first, second = untimed(empty_place / "whole"), untimed(empty_place / "killed")
    assert first == second and first[0]["kl"] == 0 and len(first) == 8


def untimed(run: Path) -> list[dict]:
    """metrics.jsonl without what the clock decides."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]


def test_random_directions_and_effects_are_shared_by_two_processes(saerl, tiny_planted_model, empty_place):
    tiny_sae(empty_place / "saes")
    words = ["rlhf", "adapter=random_dictionary", *WORDS[2:], f"adapter.saes={empty_place / 'saes'}", "algo.phases=1"]
    few = ["adapter.sparsity.l1=0.01", "adapter.sparsity.l1_scale=effect", "adapter.sparsity.hard_concrete=1e-3"]
    done = saerl(*words, *few, "launch=cpu_2", "launch.cpu=true", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    record = json.loads((empty_place / "run" / "run.json").read_text())
    assert record["frozen_unchanged"] is True and record["num_processes"] == 2
    assert record["inputs"]["sae"]["mlp_out.1"]["path"].endswith("run/sae/mlp_out.1")
    assert untimed(empty_place / "run")[0]["kl"] == 0


def test_another_number_of_processes_is_another_run(saerl, tiny_planted_model, empty_place):
    tiny_sae(empty_place / "saes")
    words = [*WORDS, f"adapter.saes={empty_place / 'saes'}", "hydra.run.dir=run", "algo.phases=1"]
    assert saerl(*words).returncode == 0
    refused = saerl(*words, "launch=cpu_2")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
