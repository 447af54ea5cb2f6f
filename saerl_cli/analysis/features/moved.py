"""What RLHF did to features: which coefficients moved, when, and what the features do in the policy."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saerl_cli.activations import special_ids, text_mask
from saerl_cli.adapter import SparseCoeffLayer, effects, moved
from saerl_cli.adapter.coefficients.gates import gate
from saerl_cli.adapter.files import check_adapter, module_of, read_deltas
from saerl_cli.analysis.features.describe import (
    Depth,
    Described,
    by_site,
    contexts_of,
    describe_features,
    heldout_text,
)
from saerl_cli.analysis.features.labels import put_labels
from saerl_cli.analysis.features.stream import (
    MOST_AT_ONCE,
    SPARE,
    Census,
    Keep,
    Places,
    Source,
    Text,
    collect,
    take_census,
    windows_at,
)
from saerl_cli.config.groups import ModelKind
from saerl_cli.config.rlhf import RlhfConfig
from saerl_cli.data.prompts import Prompt
from saerl_cli.models import load_model, resolve_sites
from saerl_cli.rl.adapters import adapter_of
from saerl_cli.rl.policy import Policy
from saerl_cli.rl.runs import policy_folder, run_config, snapshot_files
from saerl_cli.run.files import write_json
from saerl_cli.sae.files import load_sae

Deltas = dict[str, Tensor]
"""Site -> delta = c - 1 of every feature, [M]."""


def features_file(run: Path) -> Path:
    """Where a run keeps what `describe_run` found."""
    return run / "features.json"


def coefficient_folder(run: Path | str) -> tuple[RlhfConfig, Path]:
    """The settings and the adapter folder of a finished run with coefficients.

    Raises:
        ValueError: no such run, not finished, or without coefficients.
    """
    config = run_config(run)
    if adapter_of(config.adapter).saes is None:
        raise ValueError(f"{run} trained adapter={config.adapter.kind}: it has no coefficients of features")
    return config, policy_folder(run, config)


def describe_run(run: Path, count: int = 40, tokens: int = 20_000) -> dict[str, Any]:
    """What RLHF did to the features of a finished coefficient run; also written to RUN/features.json.

    Activations are those of the untouched model on held-out text: what a feature is, not what it has become.

    Args:
        run: run directory of `saerl rlhf --sparse-coeffs`.
        count: features described, by effect.
        tokens: held-out tokens read, at most.

    Returns:
        `features`: what `describe_features` says of each, with `delta`, `effect` and `coefficient`, largest effect
        first; `deltas`: site -> delta of every feature.

    Raises:
        ValueError: no finished run of that kind.
    """
    config, folder = coefficient_folder(run)
    adapter, deltas = check_adapter(folder), read_deltas(folder)
    loaded = load_model(config.model)
    text = heldout_text(config.data, config.model, loaded, tokens)
    sites = {site.name: site for site in resolve_sites(list(deltas), loaded.model)}
    sources = {
        name: Source(loaded.model, sites[name], load_sae(adapter.find_sae(sites[name].module))) for name in deltas
    }
    censuses = {name: take_census(source, text) for name, source in sources.items()}
    chosen = strongest(sources, censuses, deltas, count)
    depth = Depth(contexts=3, quantiles=4, attributes=config.model.kind is ModelKind.planted)
    features = [
        one
        for name, ids in chosen.items()
        for one in describe_features(sources[name], loaded, text, censuses[name], ids, depth)
    ]
    put_deltas(features, deltas, coefficient_paths(run, config, deltas))
    put_labels(features, {})
    features.sort(key=lambda one: -one["effect"])
    found = {
        "features": features,
        "deltas": {name: [round(float(d), 6) for d in delta] for name, delta in deltas.items()},
    }
    write_json(features_file(run), found)
    return found


# --- coefficients ----------------------------------------------------------------------------------------------------


def strongest(
    sources: Mapping[str, Source], censuses: Mapping[str, Census], found: Mapping[str, Tensor], count: int
) -> dict[str, list[int]]:
    """Choose the `count` features of all sites that moved and whose coefficients write most, by site."""
    ranked: list[tuple[float, str, int]] = []
    for name, source in sources.items():
        delta, mean = found[name], censuses[name].mean
        effect = torch.where(moved(delta), effects(delta, mean, source.sae.W_dec).cpu(), -1.0)
        best = effect.topk(min(count, len(effect)))
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ranked += [(value, name, i) for value, i in pairs if value >= 0]
    chosen: dict[str, list[int]] = {}
    for _, name, i in sorted(ranked, key=lambda entry: -entry[0])[:count]:
        chosen.setdefault(name, []).append(i)
    return chosen


def put_deltas(features: Sequence[Described], deltas: Mapping[str, Tensor], paths: "Paths") -> None:
    """Give every feature its `delta`, the `effect` of that, and its `coefficient` over training as (step, c)."""
    for one in features:
        site, i = one["site"], one["feature"]
        one["delta"] = float(deltas[site][i])
        one["effect"] *= abs(one["delta"])
        one["coefficient"] = [[step, round(1 + float(delta[i]), 5)] for step, delta in paths.get(site, [])]


Paths = dict[str, list[tuple[int, Tensor]]]
"""Site -> step and delta [M] of every policy that was kept, in order."""


def coefficient_paths(run: Path | str, config: RlhfConfig, final: Mapping[str, Tensor]) -> Paths:
    """The coefficients over training: untouched, those of RUN/policies, the final ones."""
    from saerl_cli.run.files import read_jsonl

    names = {module: site for site, module in modules_of(run, config).items()}
    paths: Paths = {site: [(0, torch.zeros_like(delta))] for site, delta in final.items()}
    for step, file in snapshot_files(run):
        for module, delta in snapshot_deltas(file).items():
            if names.get(module) in paths:
                paths[names[module]].append((step, delta))
    lines = read_jsonl(Path(run) / "metrics.jsonl")
    last = max([line["step"] for line in lines if "step" in line], default=0)
    for site, path in paths.items():
        path.append((max(last, path[-1][0] + 1), final[site]))
    return paths


def modules_of(run: Path | str, config: RlhfConfig) -> dict[str, str]:
    """Site -> module path of the SAEs of a run's adapter."""
    adapter = check_adapter(policy_folder(run, config))
    return {site: module for module, site in (adapter.sites or {}).items()}


def snapshot_deltas(file: Path) -> Deltas:
    """Module path -> delta [M] of a policy that was kept; gates multiplied in.

    Raises:
        ValueError: the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        saved = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is corrupted ({error})") from None
    found = {}
    for key, value in saved.items():
        if ".sparse_coeffs_delta." in key:
            gates = saved.get(key.replace("sparse_coeffs_delta", "sparse_coeffs_gate"))
            found[module_of(key)] = value if gates is None else value * gate(gates)
    return found


# --- before and after ------------------------------------------------------------------------------------------------


def in_policy(policy: Policy, source: Source, reference: bool = False) -> Source:
    """The same feature activations in a policy: what its coefficients multiply, hence before they do."""
    model = policy.reference_model if reference and policy.reference_model is not None else policy.model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    module = source.site.module
    if isinstance(base.get_submodule(module), SparseCoeffLayer):
        module += ".base_layer"
    return replace(source, model=base, site=replace(source.site, module=module))


def put_heldout(
    features: Sequence[Described], policy: Policy, sources: Mapping[str, Source], text: Text, contexts: int = 3
) -> None:
    """Give every feature `heldout`: mean activation before and after, and contexts at the same places.

    Contexts are the strongest of the untouched model: (token, activation before, activation after).
    """
    for site, own in groups(features):
        ids, peak = torch.tensor([one["feature"] for one in own]), torch.tensor([one["peak"] for one in own])
        with policy.reference():
            source = in_policy(policy, sources[site], reference=True)
            kept = collect(source, text, ids, peak, Keep(SPARE * contexts, sample=0, products=False))
        source = in_policy(policy, sources[site])
        after = collect(source, text, ids, peak, Keep(0, sample=0, products=False)).by_token.sum(0) / max(
            text.tokens, 1
        )
        there = windows_at(source, text, kept.top, kept.chosen)
        for c, one in enumerate(own):
            paired = paired_contexts(kept.top, there, c, text, policy.tokenizer, contexts)
            one["heldout"] = {"mean_before": one["mean"], "mean_after": float(after[c]), "contexts": paired}


def groups(features: Sequence[Described]) -> Iterator[tuple[str, list[Described]]]:
    """Site and features of it, as many as are collected together."""
    for site, own in by_site(features).items():
        for first in range(0, len(own), MOST_AT_ONCE):
            yield site, own[first : first + MOST_AT_ONCE]


def paired_contexts(
    places: Places, there: Tensor, c: int, text: Text, tokenizer: Any, n: int
) -> list[list[tuple[str, float, float]]]:
    """The first `n` contexts of places with the activations of both models: (token, before, after)."""
    other = replace(places, window=there)
    before, after = (contexts_of(which, c, text, tokenizer, n) for which in (places, other))
    return [
        [(token, x, y) for (token, x), (_, y) in zip(*pair, strict=True)] for pair in zip(before, after, strict=True)
    ]


def completions_text(prompts: Sequence[Prompt], completions: Sequence[list[int]], tokenizer: Any) -> Text:
    """Prompts with their completions as rows filled up on the right; the completions' text alone counts."""
    rows = [[*prompt.input_ids, *ids] for prompt, ids in zip(prompts, completions, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    mask = text_mask(ids, special_ids(tokenizer))
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        mask[i, : len(prompt.input_ids)] = False
        mask[i, len(row) :] = False
    return Text(ids, mask, torch.tensor([len(row) for row in rows]))


def put_samples(
    features: Sequence[Described],
    policy: Policy,
    sources: Mapping[str, Source],
    before: Text,
    after: Text,
    contexts: int,
) -> None:
    """Give every feature `samples`: in completions of the reference and of the policy, read by the model that wrote.

    Args:
        features: described.
        policy: and its reference.
        sources: site -> where its features are read.
        before: completions of the reference.
        after: completions of the policy, of the same prompts with the same random numbers.
        contexts: shown of each.
    """
    for name, text, reference in (("before", before, True), ("after", after, False)):
        with policy.reference() if reference else nullcontext():
            for site, own in groups(features):
                source = in_policy(policy, sources[site], reference)
                ids, peak = torch.tensor([one["feature"] for one in own]), torch.tensor([one["peak"] for one in own])
                kept = collect(source, text, ids, peak, Keep(SPARE * contexts, sample=0, products=False))
                mean = (kept.by_token.sum(0) / max(text.tokens, 1)).tolist()
                for c, one in enumerate(own):
                    samples = one.setdefault("samples", {})
                    samples[f"mean_{name}"] = mean[c]
                    samples[f"contexts_{name}"] = contexts_of(kept.top, c, text, policy.tokenizer, contexts)
