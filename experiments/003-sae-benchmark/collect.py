"""Collecting activations at layer 1 of 6 against a full forward pass, a random model of the shape of Pythia-70M.

python collect.py        # prints one JSON line; single thread, CPU seconds, taken in turn
"""

import json
import time
from collections.abc import Callable
from statistics import median

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from saerl_cli.activations import capture
from saerl_cli.models import resolve_sites

torch.set_num_threads(1)
torch.manual_seed(0)
shape = GPTNeoXConfig(
    hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048, vocab_size=50304
)
model = GPTNeoXForCausalLM(shape).eval()
ids = torch.randint(0, 50304, (8, 128), generator=torch.Generator().manual_seed(0))


def cpu(work: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    begin = time.process_time()
    with torch.no_grad():
        work()
    return time.process_time() - begin


ways = {
    "full forward": lambda: model(input_ids=ids, use_cache=False),
    "all layers, no vocabulary head": lambda: model.gpt_neox(input_ids=ids, use_cache=False),
    "mlp_out.1": lambda: capture(model, resolve_sites(["mlp_out.1"], model), ids),
    "resid_post.1": lambda: capture(model, resolve_sites(["resid_post.1"], model), ids),
}
found: dict[str, list[float]] = {name: [] for name in ways}
for number in range(11):
    for name, way in ways.items():
        seconds = cpu(way)
        if number:  # the first call of each warms up
            found[name].append(seconds)
full, trunk = found["full forward"], found["all layers, no vocabulary head"]
ratios = {
    f"{site} over {name}": median(a / b for a, b in zip(found[site], whole, strict=True))
    for site in ("mlp_out.1", "resid_post.1")
    for name, whole in (("full forward", full), ("all layers", trunk))
}
print(json.dumps({"seconds": {name: median(times) for name, times in found.items()}, "ratios": ratios}))
