"""Scoring and updates with and without the frozen part computed once, lowest splice at layer L of N.

python scoring.py [--layers 12] [--at 3 6 9] [--rounds 3]     # JSON lines; single thread, CPU seconds, taken in turn
"""

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import pieces
import torch
from torch.utils.flop_counter import FlopCounterMode

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--layers", type=int, default=12)
p.add_argument("--at", type=int, nargs="+", default=[3, 6, 9])
p.add_argument("--width", type=int, default=256)
p.add_argument("--vocabulary", type=int, default=8192)
p.add_argument("--rollouts", type=int, default=16)
p.add_argument("--tokens", type=int, default=40)
p.add_argument("--rounds", type=int, default=3)
a = p.parse_args()
torch.set_num_threads(1)
texts = pieces.prompts(a.rollouts, 8, a.vocabulary)


def run(layer: int, cache: bool, folder: Path, count_flops: bool = False) -> dict[str, Any]:
    """One phase; CPU seconds (or floating-point operations) of scoring and of updates, and what was learned."""
    trainer = pieces.ppo(
        folder, pieces.random_model(a.layers, a.width, a.vocabulary), f"mlp_out.{layer}", texts, max_steps=16,
        per_device_train_batch_size=a.rollouts // 4, steps_per_generation=4, num_iterations=4,
        max_completion_length=a.tokens, prefix_cache=cache,
    )  # fmt: skip
    score, loss = trainer._get_per_token_logps_and_entropies, trainer.training_step
    used = {"scoring": 0.0, "updates": 0.0}

    def measured(kind: str, work: Any) -> Any:
        if not count_flops:
            result, seconds = pieces.cpu(work)
            used[kind] += seconds
            return result
        with FlopCounterMode(display=False) as counter:
            result = work()
        used[kind] += counter.get_total_flops()
        return result

    def scoring(*args: Any, **kwargs: Any) -> Any:
        if trainer.order is None:
            return score(*args, **kwargs)
        return measured("scoring", lambda: score(*args, **kwargs))

    def updates(model: Any, inputs: Any, items: Any = None) -> Any:
        if trainer._step % 16 == 0:  # generation comes first, outside the clock
            inputs = trainer._prepare_inputs(inputs)
        else:
            inputs = trainer._buffered_inputs[trainer._step % 4]
        prepare, trainer._prepare_inputs = trainer._prepare_inputs, lambda batch: batch
        try:
            return measured("updates", lambda: loss(model, inputs, items))
        finally:
            trainer._prepare_inputs = prepare

    trainer._get_per_token_logps_and_entropies, trainer.training_step = scoring, updates
    trainer.train()
    learned = {name: tensor.detach().clone() for name, tensor in trainer.trainable()}
    return used | {"learned": learned, "prefix": trainer.prefix is not None}


with tempfile.TemporaryDirectory() as place:
    for layer in a.at:
        folder = Path(place) / str(layer)
        flops = {cache: run(layer, cache, folder, count_flops=True) for cache in (False, True)}
        rounds = [{cache: run(layer, cache, folder) for cache in (False, True)} for _ in range(a.rounds)]
        assert all(r[True]["prefix"] and not r[False]["prefix"] for r in rounds)
        same = all(
            torch.equal(tensor, r[True]["learned"][name])
            for r in rounds
            for name, tensor in r[False]["learned"].items()
        )
        numbers: dict[str, Any] = {}
        for kind in ("scoring", "updates"):
            ratio = flops[True][kind] / flops[False][kind]
            times = [r[True][kind] / r[False][kind] for r in rounds]
            numbers[kind] = {
                "flops_ratio": ratio, "time_ratio": median(times), "over": median(times) / ratio,
                "plain_seconds": [r[False][kind] for r in rounds], "cached_seconds": [r[True][kind] for r in rounds],
            }  # fmt: skip
        whole = [sum(r[True][k] for k in numbers) / sum(r[False][k] for k in numbers) for r in rounds]
        flops_whole = sum(flops[True][k] for k in numbers) / sum(flops[False][k] for k in numbers)
        together = {"flops_ratio": flops_whole, "time_ratio": median(whole), "over": median(whole) / flops_whole}
        pieces.report(
            kind="scoring", seed=3, layer=layer, layers=a.layers, equal_to_the_bit=same, together=together, **numbers
        )
