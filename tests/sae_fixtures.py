"""Asking other SAE libraries, which live in an environment of their own."""

import os
import subprocess
from pathlib import Path

import pytest

PEERS_PYTHON = "SAERL_PEERS_PYTHON"


def ask_peers(*words: str) -> str:
    """What `loss_peers.py` prints; skips the test where that environment is not given."""
    python = os.environ.get(PEERS_PYTHON)
    if not python:
        pytest.skip(f"{PEERS_PYTHON} names no Python with sae-lens, dictionary-learning and eai-sparsify")
    script = str(Path(__file__).parent / "loss_peers.py")
    done = subprocess.run(
        [python, script, *words], env=os.environ | {"WANDB_MODE": "disabled"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
