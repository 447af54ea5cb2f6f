"""Eight SAEs on one stream against the same parts alone: the forward passes once, and eight SAEs' steps.

python many.py [--steps 40]        # prints one JSON line; single thread, CPU seconds
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from statistics import median

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from saerl_cli.activations import ActivationStream
from saerl_cli.config.sae import Resample, SaeConfig
from saerl_cli.models import resolve_sites
from saerl_cli.sae.layout import Scratch
from saerl_cli.sae.loop import training
from saerl_cli.sae.train import SaeTrainer

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--steps", type=int, default=24)
p.add_argument("--rounds", type=int, default=3)
a = p.parse_args()
torch.set_num_threads(1)
SKIP, BATCH = 8, 2048
KS = (8, 16, 24, 32, 48, 64, 96, 128)


def stream() -> ActivationStream:
    """Activations at mlp_out.3 of a random model of the shape of Pythia-70M with a small vocabulary."""
    torch.manual_seed(0)
    shape = GPTNeoXConfig(
        hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048, vocab_size=8192
    )
    model = GPTNeoXForCausalLM(shape).eval()
    rows = torch.randint(1, 8192, (400, 128), generator=torch.Generator().manual_seed(0))
    return ActivationStream(model, rows, resolve_sites(["mlp_out.3"], model), [0], BATCH, BATCH)


def trainers(ks: tuple[int, ...]) -> dict[str, SaeTrainer]:
    """TopK SAEs 512 -> 4096 on one scratch."""
    config = SaeConfig(tokens=a.steps * BATCH, batch_size=BATCH, resample=Resample.none)
    scratch = Scratch()
    return {f"k{k}": SaeTrainer(512, replace(config, k=k), scratch=scratch) for k in ks}


def seconds(batches: Iterator, ks: tuple[int, ...]) -> float:
    """CPU seconds a step, the first ones left out."""
    saes = trainers(ks) if ks else {}
    places = {name: ("mlp_out.3", None) for name in saes}
    marks = []
    if not saes:
        for _ in range(a.steps):
            next(batches)
            marks.append(time.process_time())
    else:
        for _ in training(batches, saes, 10**9, places):
            marks.append(time.process_time())
    return (marks[-1] - marks[SKIP]) / (len(marks) - 1 - SKIP)


def held(batch: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """One batch again and again: SAE steps without a language model."""
    while True:
        yield batch


found: dict[str, list[float]] = {"together": [], "forward": [], "alone": [], "separate": []}
for _ in range(a.rounds):
    found["together"].append(seconds(stream(), KS))
    found["forward"].append(seconds(stream(), ()))
    batch = next(stream())
    found["alone"].append(sum(seconds(held(batch), (k,)) for k in KS))
    found["separate"].append(sum(seconds(stream(), (k,)) for k in KS))
pairs = list(zip(found["together"], found["forward"], found["alone"], found["separate"], strict=True))
print(
    json.dumps(
        {
            "seconds_a_step": found,
            "together_over_parts": median(t / (f + s) for t, f, s, _ in pairs),
            "together_over_separate_runs": median(t / r for t, _, _, r in pairs),
            "torch": torch.__version__,
        }
    )
)
