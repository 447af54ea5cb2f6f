"""The scripts behind experiments/003 still run, small."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = ROOT / "experiments" / "003-sae-benchmark"
SMALL = ["--d-in", "32", "--d-sae", "128", "--batch", "256", "--steps", "40", "--n-acts", "4096", "--k", "8"]


@pytest.fixture(scope="module")
def harness() -> Path:
    folder = ROOT.parent / "shared" / "bench" / "peers"
    if not folder.is_dir():
        pytest.skip("needs the peers' harness at ../shared/bench/peers")
    return folder


def result(harness: Path, *words: str) -> dict:
    path = os.pathsep.join([str(harness), str(ROOT)])
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "run_saerl.py"), *SMALL, *words],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


def test_all_start_from_the_harness_s_sae(harness):
    """At no learning rate the reloaded SAE is the shared start; in bfloat16 only training is rounded."""
    plain, rounded = (result(harness, "--lr", "1e-12", *flags) for flags in ([], ["--bf16"]))
    assert plain["fvu"] == pytest.approx(rounded["fvu"], rel=1e-6)
    assert plain["l0"] == 8.0


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["topk", "batchtopk", "l1", "jumprelu", "gated"])
def test_every_architecture_learns(harness, arch):
    start = result(harness, "--arch", arch, "--lr", "1e-12", "--l1", "0.1")
    assert result(harness, "--arch", arch, "--lr", "3e-3", "--l1", "0.1")["fvu"] < start["fvu"]
