"""Sampling with coefficients on, and after fixing them, against the base model; and `generate()` of transformers.

python generation.py [--rounds 5]     # one JSON line a setting; single thread, CPU seconds, taken in turn
"""

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import pieces
import torch
from peft import get_peft_model
from transformers import GenerationConfig

from saerl_cli.rl.rollouts.sampling import compact, sample

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--rounds", type=int, default=5)
p.add_argument("--rows", type=int, default=16)
p.add_argument("--tokens", type=int, default=24)
p.add_argument("--changed", type=int, default=100)
p.add_argument("--width", type=int, default=512)
p.add_argument("--layers", type=int, default=6)
p.add_argument("--vocabulary", type=int, default=50304)
a = p.parse_args()
torch.set_num_threads(1)
shape, site = (a.layers, a.width, a.vocabulary), f"mlp_out.{a.layers // 2}"
ids = torch.randint(2, a.vocabulary, (a.rows, 8), generator=torch.Generator().manual_seed(0))
mask = torch.ones_like(ids)


def draw(model: Any) -> None:
    """One batch of completions that do not end early."""
    torch.manual_seed(0)
    with compact(model):
        sample(model, ids, mask, a.tokens, [], 1.0)


def stock(model: Any) -> None:
    """The same by transformers."""
    settings = GenerationConfig(
        max_new_tokens=a.tokens, do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0, disable_compile=True
    )
    model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)


def measured(setting: str, k: int | None, changed: int | None, folder: Path) -> None:
    """CPU seconds of every way, in turn, and their medians over the base model's."""
    models = [pieces.random_model(*shape) for _ in range(3)]
    plain, policy, other = models[0], *(get_peft_model(m, pieces.adapter(m, folder, site, k)) for m in models[1:])
    layers = [m.base_model.model.gpt_neox.layers[a.layers // 2].mlp for m in (policy, other)]
    delta = 0.1 * torch.randn(layers[0].sae.d_sae, generator=torch.Generator().manual_seed(4))
    if changed is not None:
        delta[changed:] = 0
    for layer in layers:
        layer.sparse_coeffs_delta["default"].weight.data.copy_(delta)
        if k is None:  # a bias at which about K features are active, as in a trained SAE
            pre = layer.sae.pre_activations(layer.base_layer(torch.randn(256, a.width)))
            layer.sae.b_enc -= pre.flatten().kthvalue(int(pre.numel() * (1 - pieces.K / layer.sae.d_sae))).values
    exported = other.merge_and_unload()
    ways = {
        "base": lambda: draw(plain),
        "coefficients": lambda: draw(policy),
        "exported": lambda: draw(exported),
        "generate()": lambda: stock(plain),
    }
    found: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(a.rounds + 1):
        for way, work in ways.items():
            seconds = pieces.cpu(work)[1]
            if number:  # the first warms up
                found[way].append(seconds)
    ratios = {w: median(x / b for x, b in zip(found[w], found["base"], strict=True)) for w in ways}
    pieces.report(kind="generation", seed=0, setting=setting, changed=changed, ratios=ratios, seconds=found)


torch.set_grad_enabled(False)
with tempfile.TemporaryDirectory() as place:
    measured("topk, all changed", pieces.K, None, Path(place) / "topk")
    measured("relu, all changed", None, None, Path(place) / "relu")
    measured(f"relu, {a.changed} changed", None, a.changed, Path(place) / "few")
