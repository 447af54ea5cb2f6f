"""What features are, as plain data: one dictionary a feature, the same for a command, a page and a notebook.

Keys: site, feature, trivial (the site sees the current token alone), tokens read, density, mean and peak activation,
effect; fires_on, promotes, suppresses; contexts, quantiles, histogram; neighbours; and in the planted language
attribute, f1, auroc, input and output. A context is a list of (token, activation).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from saerl_cli.activations import special_ids, text_mask, token_rows
from saerl_cli.analysis.features.attributes import input_side, output_side, truth_of
from saerl_cli.analysis.features.directions import largest_others, logit_effect, nearest, piece, shown
from saerl_cli.analysis.features.stream import (
    AFTER,
    BEFORE,
    BINS,
    MOST_AT_ONCE,
    PRODUCTS_AT_ONCE,
    SPARE,
    Census,
    Collected,
    Keep,
    Places,
    Source,
    Text,
    collect,
    pearson,
)
from saerl_cli.config.groups import DataConfig, ModelConfig
from saerl_cli.data.documents import documents, row_length
from saerl_cli.models import Loaded
from saerl_cli.sae.metrics import first_rows

TOKENS_SHOWN = 10
"""Tokens that a feature fires on, promotes, suppresses."""
NEIGHBOURS = 5
SAMPLED = 200
"""Firings drawn for the quantiles."""

Described = dict[str, Any]
Context = list[tuple[str, float]]


@dataclass(frozen=True)
class Depth:
    """How much of every feature is kept."""

    contexts: int = 8
    """Contexts of the strongest activation."""
    quantiles: int = 5
    """Equal parts of the activations above 0."""
    silent: int = 0
    """Contexts in which it does not fire."""
    seed: int = 0
    """Of the contexts drawn."""
    attributes: bool = False
    """Whether to compare with the attributes of the planted language; keeps an activation a token and feature."""
    dashboards: bool = False
    """Whether to keep what Neuronpedia's files hold besides, under `neuronpedia`."""

    @property
    def a_quantile(self) -> int:
        """Contexts from each quantile."""
        return max(1, self.contexts // 4)


def heldout_text(data: DataConfig, model: ModelConfig, loaded: Loaded, tokens: int) -> Text:
    """Held-out text of so many tokens, or all there is, in rows.

    Raises:
        ValueError: there is no text.
    """
    special = special_ids(loaded.tokenizer)
    rows = token_rows(documents(data, model, "heldout"), loaded.tokenizer, row_length(data, loaded.context_size))
    rows = first_rows(rows, special, tokens)
    return Text(rows, text_mask(rows, special))


def describe_features(
    source: Source, loaded: Loaded, text: Text, census: Census, chosen: Sequence[int], depth: Depth | None = None
) -> list[Described]:
    """What some features of an SAE are, in the order given.

    Args:
        source: model, site and SAE.
        loaded: the untouched language model and its tokenizer.
        text: held-out text.
        census: of the same source and text.
        chosen: features.
        depth: how much is kept.

    Raises:
        ValueError: a feature that the SAE does not have.
    """
    depth = depth or Depth()
    beyond = [i for i in chosen if not 0 <= i < source.sae.d_sae]
    if beyond:
        raise ValueError(f"{source.site.name} has the features 0 to {source.sae.d_sae - 1}, not {beyond[0]}")
    at_once = max(1, min(MOST_AT_ONCE, PRODUCTS_AT_ONCE // source.sae.d_sae))
    truth = truth_of(text.rows, text.mask, loaded.tokenizer) if depth.attributes else None
    device = source.sae.W_dec.device
    keep = Keep(SPARE * depth.contexts, SAMPLED, depth.silent, depth.seed, values=depth.attributes)
    found: list[Described] = []
    for first in range(0, len(chosen), at_once):
        ids = torch.tensor(chosen[first : first + at_once], device=device)
        kept = collect(source, text, ids, census.peak[ids], keep)
        found += described(source, loaded, text, census, kept, depth, truth)
    return found


def described(
    source: Source,
    loaded: Loaded,
    text: Text,
    census: Census,
    kept: Collected,
    depth: Depth,
    truth: tuple[Tensor, tuple[str, ...]] | None,
) -> list[Described]:
    """The dictionaries of the features that were collected."""
    sae, site, tokenizer = source.sae, source.site, loaded.tokenizer
    target = site.module if sae.target is None else module_of(loaded, sae.target)
    logits = logit_effect(loaded.model, target, sae.W_dec[kept.chosen])[:, : len(tokenizer)]  # [C, V]
    cosine, near = nearest(sae.W_dec, kept.chosen, NEIGHBOURS)
    correlation, together = largest_others(pearson(kept, census), kept.chosen, NEIGHBOURS)
    norm, density, mean = sae.W_dec.norm(dim=-1), census.density, census.mean
    found = []
    for c, feature in enumerate(kept.chosen.tolist()):
        peak = float(census.peak[feature])
        found.append(
            {
                "site": site.name,
                "feature": feature,
                "trivial": site.trivial,
                "tokens": census.tokens,
                "density": float(density[feature]),
                "mean": float(mean[feature]),
                "peak": peak,
                "effect": float(mean[feature] * norm[feature]),
                "fires_on": [word for word, _ in firing_tokens(kept, c, tokenizer)],
                "mass": [round(share, 4) for _, share in firing_tokens(kept, c, tokenizer)],
                **promoted(logits[c], tokenizer),
                "contexts": contexts_of(kept.top, c, text, tokenizer, depth.contexts),
                "quantiles": quantiles_of(kept.sample, c, text, tokenizer, depth),
                "histogram": {
                    "edges": [round(peak * i / BINS, 6) for i in range(BINS + 1)] if peak > 0 else [],
                    "tokens": kept.histogram[c].long().tolist() if peak > 0 else [],
                },
                "neighbours": {
                    "direction": neighbour_list(near[c], cosine[c], "cosine"),
                    "together": [n for n in neighbour_list(together[c], correlation[c], "correlation") if peak > 0],
                },
            }
        )
    if truth is not None:
        inner = input_side(torch.cat(kept.values), *truth)
        for one, side, out in zip(found, inner, output_side(logits, tokenizer), strict=True):
            fires = one["peak"] > 0  # a silent feature detects nothing, and stands for nothing
            one |= {"attribute": side["attribute"] if fires else "", "f1": side["f1"] if fires else None}
            one |= {"auroc": side["auroc"] if fires else None, "input": side["attributes"], "output": out}
    if depth.silent:
        for c, one in enumerate(found):
            one["silent"] = contexts_of(kept.silent, c, text, tokenizer, depth.silent)
            one["drawn"] = contexts_of(kept.sample, c, text, tokenizer, depth.contexts + depth.silent)
    if depth.dashboards:
        for c, one in enumerate(found):
            one["neuronpedia"] = tables(source, census, kept, logits, c)
    return found


def module_of(loaded: Loaded, site: str) -> str:
    """The module of another site."""
    from saerl_cli.models import resolve_sites

    return resolve_sites([site], loaded.model)[0].module


def firing_tokens(kept: Collected, c: int, tokenizer: Any) -> list[tuple[str, float]]:
    """Tokens with the largest summed activation and their shares of all of it, largest first."""
    mass = kept.by_token[:, c]
    best = mass.topk(min(TOKENS_SHOWN, len(mass)))
    total = max(float(mass.sum()), 1e-30)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [(shown(tokenizer, i), value / total) for i, value in pairs if value > 0]


def promoted(effect: Tensor, tokenizer: Any) -> Described:
    """The tokens whose logit a direction moves most, and by how much: effect [V]; not those that no text holds."""
    fillers = {tokenizer.pad_token_id, tokenizer.unk_token_id} - {tokenizer.eos_token_id}
    written = torch.tensor([i for i in range(len(effect)) if i not in fillers], device=effect.device)
    found: Described = {}
    for name, sign in (("promotes", 1), ("suppresses", -1)):
        best = (sign * effect[written]).topk(min(TOKENS_SHOWN, len(written)))
        found[name] = [shown(tokenizer, i) for i in written[best.indices].tolist()]
        found[f"{name}_by"] = [round(sign * value, 4) for value in best.values.tolist()]
    return found


def neighbour_list(features: Tensor, scores: Tensor, name: str) -> list[Described]:
    """Features [n] and their scores [n] as plain data."""
    pairs = zip(features.tolist(), scores.tolist(), strict=True)
    return [{"feature": feature, name: round(score, 4)} for feature, score in pairs]


# --- contexts --------------------------------------------------------------------------------------------------------


def context_at(row: Tensor, at: int, window: Sequence[float], tokenizer: Any) -> Context:
    """Tokens and activations around a place, cut at the ends of the row [seq]."""
    first, last = max(0, at - BEFORE), min(len(row), at + AFTER + 1)
    shift = BEFORE - at
    return [(piece(tokenizer, int(row[t])), round(window[t + shift], 3)) for t in range(first, last)]


def placed_contexts(places: Places, c: int, text: Text, tokenizer: Any, n: int) -> list[tuple[int, Context]]:
    """The first `n` contexts of a feature's places, best first, those that read alike once, and where in each it is."""
    found: dict[tuple[int, ...], tuple[int, Context]] = {}
    columns = (tensor[:, c].tolist() for tensor in (places.score, places.row, places.at, places.window))
    for score, row, at, window in zip(*columns, strict=True):
        if score <= 0 or len(found) == n:
            break
        ids = tuple(text.row(row)[max(0, at - BEFORE) : at + AFTER + 1].tolist())
        if ids not in found:
            found[ids] = min(at, BEFORE), context_at(text.row(row), at, window, tokenizer)
    return list(found.values())


def contexts_of(places: Places, c: int, text: Text, tokenizer: Any, n: int) -> list[Context]:
    """`placed_contexts` without the places."""
    return [context for _, context in placed_contexts(places, c, text, tokenizer, n)]


def quantiles_of(places: Places, c: int, text: Text, tokenizer: Any, depth: Depth) -> list[Described]:
    """Equal parts of a random sample of a feature's activations, strongest first, each with contexts.

    Returns:
        {from, to, contexts, at}: bounds are quantiles of the sample, and of all activations where it holds them all;
        `at` is the token of each context that is meant.
    """
    firing = places.score[:, c] > 0
    value = places.value[firing, c]
    if len(value) == 0:
        return []
    edges = torch.quantile(value, torch.linspace(0, 1, depth.quantiles + 1, device=value.device)).tolist()
    ranks = value.argsort(stable=True).argsort(stable=True)
    part = (ranks * depth.quantiles) // len(value)  # [firings], 0 the weakest
    found = []
    for q in reversed(range(depth.quantiles)):
        inside = firing.nonzero()[:, 0][part == q]
        some = Places(*(t[inside] for t in (places.score, places.row, places.at, places.window)))
        placed = placed_contexts(some, c, text, tokenizer, depth.a_quantile)
        found.append(
            {
                "from": round(edges[q], 4),
                "to": round(edges[q + 1], 4),
                "contexts": [context for _, context in placed],
                "at": [at for at, _ in placed],
            }
        )
    return found


# --- for dashboards --------------------------------------------------------------------------------------------------


def tables(source: Source, census: Census, kept: Collected, logits: Tensor, c: int, n: int = 3) -> Described:
    """What Neuronpedia shows besides: dimensions of the direction, correlated dimensions and features, logits.

    `l1` of a correlated one is the cosine of its activations with the feature's, as SAEDashboard has it; of the
    direction's dimensions the share of its absolute sum.
    """
    feature, tokens = int(kept.chosen[c]), max(census.tokens, 1)
    direction = source.sae.W_dec[feature]
    largest = direction.abs().topk(min(n, len(direction))).indices
    length = census.square[feature].sqrt().clamp_min(1e-30)
    cosines = {
        "neurons": kept.inputs[c] / (length * kept.dimensions[1].sqrt()).clamp_min(1e-30),
        "features": kept.features[c] / (length * census.square.sqrt()).clamp_min(1e-30),
    }
    mean, square = kept.dimensions / tokens
    spread = (square - mean.square()).clamp_min(0).sqrt()
    own = (census.square[feature] / tokens - census.mean[feature].square()).clamp_min(0).sqrt()
    covariance = kept.inputs[c] / tokens - census.mean[feature] * mean
    correlations = {
        "neurons": torch.where(spread * own > 1e-20, covariance / (spread * own).clamp_min(1e-20), 0.0),
        "features": pearson(kept, census)[c],
    }
    correlations["features"][feature] = -2  # not its own neighbour
    bins = torch.histc(logits[c].float().cpu(), bins=50)
    low, high = float(logits[c].min()), float(logits[c].max())
    found: Described = {
        "neuron_alignment_indices": largest.tolist(),
        "neuron_alignment_values": rounded(direction[largest]),
        "neuron_alignment_l1": rounded(direction[largest].abs() / direction.abs().sum().clamp_min(1e-30)),
        "logits_hist_data_bar_heights": bins.long().tolist(),
        "logits_hist_data_bar_values": [round(low + (high - low) * (i + 0.5) / 50, 4) for i in range(50)],
        "vector": [round(x, 6) for x in normalize(direction, dim=0).tolist()],
    }
    for kind, correlation in correlations.items():
        best = correlation.topk(min(n, len(correlation) - (kind == "features")))
        found |= {
            f"correlated_{kind}_indices": best.indices.tolist(),
            f"correlated_{kind}_pearson": rounded(best.values),
            f"correlated_{kind}_l1": rounded(cosines[kind][best.indices]),
        }
    return found


def rounded(values: Tensor) -> list[float]:
    """Numbers [n] with four decimals."""
    return [round(value, 4) for value in values.tolist()]


def by_site(described: Sequence[Described]) -> Mapping[str, list[Described]]:
    """Features by the name of their site, in order."""
    found: dict[str, list[Described]] = {}
    for one in described:
        found.setdefault(one["site"], []).append(one)
    return found
