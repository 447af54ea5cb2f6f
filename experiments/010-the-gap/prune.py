"""Copies of a run whose policies along the way are changed versions of its final policy; nothing is trained again.

python prune.py RUN OUT attribution AUDIT 16 32 64 ...      # the first n features of an audit, all others untouched
python prune.py RUN OUT magnitude 16 32 64 ...              # the n features with the largest |delta|
python prune.py RUN OUT shrink 0.2 0.4 0.6 ...              # everything that was learned, times a factor
saerl evaluate policy=OUT snapshots=true                    # their frontier

`saerl audit` ranks features by samples of its own, so that no sample both ranks and grades.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def learned(run: Path, names: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The reference's and the final policy's values of the parameters of a snapshot."""
    if (run / "adapter").is_dir():
        final = load_file(run / "adapter" / "adapter_model.safetensors")
        values = {name: final[name.replace(".default.", ".")] for name in names}
        return {name: torch.zeros_like(value) for name, value in values.items()}, values
    from saerl_cli.models import load_model
    from saerl_cli.rl.runs import run_config

    base, final = load_model(run_config(run).model).model.state_dict(), load_file(run / "model" / "model.safetensors")
    return {name: base[name] for name in names}, {name: final[name] for name in names}


def kept(values: dict[str, Tensor], scores: list[Tensor], count: int) -> dict[str, Tensor]:
    """Values of the `count` entries with the largest scores over all tensors, the others 0."""
    flat = torch.cat(scores)
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[flat.argsort(descending=True)[:count]] = True
    parts = mask.split([len(s) for s in scores])
    return {n: torch.where(part, value, 0.0) for (n, value), part in zip(values.items(), parts, strict=True)}


run, out, how, *words = sys.argv[1:]
run, out = Path(run), Path(out)
names = list(load_file(next((run / "policies").glob("step-*.safetensors"))))
reference, values = learned(run, names)
if how == "attribution":
    attributions = json.loads((Path(words.pop(0)) / "audit.json").read_text())["attributions"]
    site_of = {name: next(s for s in attributions if f".layers.{s.rpartition('.')[2]}." in name) for name in names}
    assert len(set(site_of.values())) == len(names), "of coefficients at one position of a layer"
    scores = [torch.tensor(attributions[site_of[name]], dtype=torch.float64) for name in names]
else:
    scores = [value.abs().flatten().double() for value in values.values()]

shutil.copytree(run, out, ignore=shutil.ignore_patterns("policies", "checkpoints", "audit.json", "features.json"))
(out / "policies").mkdir()
for word in words:
    if how == "shrink":
        step = round(1000 * float(word))
        changed = {n: torch.lerp(reference[n], values[n], float(word)) for n in names}
    else:
        step, changed = int(word), kept(values, scores, int(word))
    file = out / "policies" / f"step-{step}.safetensors"
    save_file({n: value.contiguous() for n, value in changed.items()}, file, {"format": "pt"})
