"""`saerl export` of a policy: a compact adapter, a PEFT folder with its SAEs, or a model."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from saerl_cli.config.groups import ModelConfig, ModelKind
from saerl_cli.rl.results import AUDIT, read_audit
from saerl_cli.run.files import atomic_folder, read_json, write_json, write_safetensors, write_text
from saerl_cli.sae.export import MANIFEST, beside, refuse_occupied

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass
class Source:
    """A policy on disk."""

    path: Path
    """The run, or the adapter folder itself."""
    folder: Path
    """Its adapter or model."""
    full: bool
    """Whether `folder` is a whole model."""


def export_policy(path: Path, to: str, out: Path | None = None, first: int | None = None) -> list[str]:
    """Write a finished policy in another form, whole or not at all.

    Args:
        path: a finished run of `saerl rlhf`, or an adapter folder.
        to: `compact`, `peft` or `model`.
        out: the folder to make; beside the source when empty.
        first: keep the coefficients of so many features, those that the run's audit ranks first, and set the others
            back to untouched; the policy whole when empty.

    Returns:
        What to print: what was written, then how it is loaded.

    Raises:
        ValueError: no finished policy there, one that has no such form, or `out` holds something else.
    """
    source = find_policy(path)
    out = (out if out is None or out.name else out.resolve()) or beside(str(path), to)
    refuse_occupied(out, [path])
    out.parent.mkdir(parents=True, exist_ok=True)
    chosen = nullcontext(source) if first is None else pruned(source, first)
    with chosen as source, atomic_folder(out, replace=True) as temporary:
        lines = FORMS[to](source, temporary)
        files = sorted(str(file.relative_to(temporary)) for file in temporary.rglob("*") if file.is_file())
        write_json(temporary / MANIFEST, {"from": str(path), "to": to, "files": files})
    return [*(line.format(out=out) for line in lines)]


def find_policy(path: Path) -> Source:
    """The policy of a run, or an adapter folder.

    Raises:
        ValueError: it is neither, or the run has not finished.
    """
    from saerl_cli.rl.adapters import adapter_of
    from saerl_cli.rl.runs import policy_folder, run_config

    if (path / CONFIG).is_file():
        return Source(path, path, full=False)
    config = run_config(path)
    return Source(path, policy_folder(path, config), adapter_of(config.adapter).whole_model)


@contextmanager
def pruned(source: Source, first: int) -> Iterator[Source]:
    """The policy with the first features of RUN/audit.json alone; beside the original, to which its SAEs are relative.

    Raises:
        ValueError: no coefficients, no audit, or another number of features than there are.
    """
    import torch

    from saerl_cli.adapter.files import module_of, read_adapter

    refuse_full(source, "compact --first")
    file = source.path / AUDIT
    if not has_coefficients(source.folder) or not file.is_file():
        raise ValueError(
            f"{source.path} has no audit.json, which says what features come first: saerl audit policy={source.path}"
        )
    attributions = {site: torch.tensor(found).double() for site, found in read_audit(file).attributions.items()}
    config, state = read_adapter(source.folder)
    sites = {module: site for module, site in (config.sites or {}).items() if site in attributions}
    total = sum(len(found) for found in attributions.values())
    if not 1 <= first <= total or len(sites) < len(attributions):
        raise ValueError(f"--first {first}: write a number from 1 to {total}, the features of {source.path}")
    scores = torch.cat([attributions[site] for site in sites.values()])
    mask = torch.zeros(len(scores)).scatter(0, scores.argsort(descending=True)[:first], 1.0)
    masks = dict(zip(sites, mask.split([len(attributions[site]) for site in sites.values()]), strict=True))
    with TemporaryDirectory(dir=source.folder.parent, prefix=".pruned-") as place:
        shutil.copytree(source.folder, place, dirs_exist_ok=True)
        kept = {key: value * masks[module_of(key)] for key, value in state.items()}
        write_safetensors(Path(place) / WEIGHTS, kept, {"format": "pt"})
        yield Source(source.path, Path(place), full=False)


# --- adapters ---------------------------------------------------------------------------------------------------------


def write_compact(source: Source, folder: Path) -> list[str]:
    """The adapter with those features that changed, and SAEs that have no others.

    Features of ReLU and JumpReLU SAEs, BatchTopK's among them, are independent. A topk SAE needs its whole encoder to
    know which are chosen, and `reconstruct` writes them all: these stay whole.

    Raises:
        ValueError: the policy has no coefficients, or none of them moved.
    """
    refuse_full(source, "compact")
    if not has_coefficients(source.folder):
        raise ValueError(f"{source.path} has no coefficients of features; write --to peft or --to model")
    return write_coefficients(source.folder, folder, compact=True)


def write_peft(source: Source, folder: Path) -> list[str]:
    """The adapter as PEFT loads it; coefficients with their SAEs inside, so that the folder can go anywhere."""
    refuse_full(source, "peft")
    if has_coefficients(source.folder):
        return write_coefficients(source.folder, folder, compact=False)
    shutil.copytree(source.folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
    from saerl_cli.adapter.files import is_ours

    kind = read_json(source.folder / CONFIG)["peft_type"]
    return [f"PEFT adapter of kind {kind} -> {{out}}", "", *recipe(is_ours(kind))]


def refuse_full(source: Source, to: str) -> None:
    """`ValueError` for a policy that is a whole model."""
    if source.full:
        raise ValueError(f"{source.path} trained every weight, so it has no adapter for --to {to}; write --to model")


def has_coefficients(folder: Path) -> bool:
    """Whether an adapter folder holds coefficients of SAE features."""
    return read_json(folder / CONFIG).get("peft_type") == "SPARSE_COEFFS"


def write_coefficients(source: Path, folder: Path, compact: bool) -> list[str]:
    """Coefficients with SAEs in `folder/sae/SITE`; a line a site."""
    from saerl_cli.adapter.coefficients.splice import only
    from saerl_cli.adapter.files import README, check_adapter, module_of, read_adapter
    from saerl_cli.sae.files import load_sae, sae_sha256, save_sae

    check_adapter(source)
    config, state = read_adapter(source)
    kept, hashes, lines = {}, {}, []
    for module, site in sorted((config.sites or {}).items(), key=lambda pair: pair[1]):
        place, found = folder / "sae" / site, config.find_sae(module)
        own = {key: value for key, value in state.items() if module_of(key) == module}
        sae = load_sae(found)
        moved = sum(value != 0 for value in own.values())  # [d_sae], of delta and bias
        features = moved.nonzero().flatten()  # pyright: ignore[reportAttributeAccessIssue]
        if compact and len(features) == 0 and config.splice != "reconstruct":
            lines.append(f"{site}: no feature changed, left out")
            continue
        if compact and sae.k is None and config.splice != "reconstruct":
            save_sae(only(sae, features), place)
            own = {key: value[features].contiguous() for key, value in own.items()}
            lines.append(f"{site}: {len(features)} of {sae.d_sae} features -> {{out}}/sae/{site}")
        else:
            shutil.copytree(found, place)
            why = f", kept whole ({'topk' if sae.k else config.splice} needs all of them)" if compact else ""
            lines.append(f"{site}: {sae.d_sae} features{why} -> {{out}}/sae/{site}")
        kept |= own
        hashes[module] = sae_sha256(place)
    if not hashes:
        raise ValueError(f"no coefficient in {source} has moved: the policy is the base model")
    saes = {module: f"sae/{(config.sites or {})[module]}" for module in hashes}
    changes = {"saes": saes, "relative_saes": saes, "sae_sha256": hashes, "target_modules": sorted(hashes)}
    changes["sites"] = {module: (config.sites or {})[module] for module in hashes}
    write_json(folder / CONFIG, read_json(source / CONFIG) | changes)
    write_safetensors(folder / WEIGHTS, kept, {"format": "pt"})
    write_text(
        folder / "README.md", README.replace("The autoencoders are not in here.", "The autoencoders are in sae/.")
    )
    return [*lines, "", *recipe(ours=True)]


def recipe(ours: bool) -> list[str]:
    """How an adapter is loaded."""
    kind = ["import saerl_cli.adapter"] if ours else []
    return [*kind, "from peft import PeftModel", 'policy = PeftModel.from_pretrained(base_model, "{out}")']


# --- models -----------------------------------------------------------------------------------------------------------


def write_model(source: Source, folder: Path) -> list[str]:
    """A model folder that transformers loads: plain weights where the adapter can be merged, else fixed splices."""
    from saerl_cli.adapter.spliced import save_spliced
    from saerl_cli.models import quiet_transformers

    load = 'AutoModelForCausalLM.from_pretrained("{out}")'
    if source.full:
        shutil.copytree(source.folder, folder, dirs_exist_ok=True)
        return ["model of plain weights -> {out}", "", "from transformers import AutoModelForCausalLM", load]
    with quiet_transformers():
        model, tokenizer = merged(source)
        ours = save_spliced(model, folder)
    tokenizer.save_pretrained(folder)
    what = "model with fixed modules inside, which needs saerl to load" if ours else "model of plain weights"
    imports = ["import saerl_cli.adapter"] if ours else []
    return [f"{what} -> {{out}}", "", *imports, "from transformers import AutoModelForCausalLM", load]


def merged(source: Source) -> tuple[Any, Any]:
    """The policy without PEFT, and its tokenizer."""
    from saerl_cli.adapter import load_adapter
    from saerl_cli.adapter.merge import into_weights
    from saerl_cli.models import load_model
    from saerl_cli.rl.policy import load_policy

    if source.folder != source.path:
        policy = load_policy(source.path)
        return into_weights(policy.model.merge_and_unload()), policy.tokenizer
    base = read_json(source.folder / CONFIG).get("base_model_name_or_path")
    if not base or not Path(base).is_dir():
        raise ValueError(f"{source.folder} names no folder of its base model ({base}); export the run instead")
    loaded = load_model(ModelConfig(kind=ModelKind.local, path=base))
    model: Any = load_adapter(loaded.model, source.folder)
    return into_weights(model.merge_and_unload()), loaded.tokenizer


FORMS: dict[str, Callable[[Source, Path], list[str]]] = {
    "compact": write_compact,
    "peft": write_peft,
    "model": write_model,
}
