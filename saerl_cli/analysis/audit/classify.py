"""What the features that moved are: the words they fire on, the attribute they detect, the words they write.

Read off the untouched model on held-out text. Letters: n text tokens, F features that moved, V the vocabulary.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saerl_cli.activations import capture, special_ids, text_mask
from saerl_cli.adapter.coefficients.deltas import site_layers
from saerl_cli.adapter.coefficients.layer import SparseCoeffLayer
from saerl_cli.analysis.attribution import AT_ONCE, Coefficients
from saerl_cli.analysis.audit.variants import ratio
from saerl_cli.analysis.features import f1_scores, final_norm, to_residual
from saerl_cli.analysis.features.attributes import truth_of
from saerl_cli.analysis.features.directions import shown
from saerl_cli.config.reward import RewardConfig
from saerl_cli.models import resolve_sites
from saerl_cli.rewards.kinds import kind_of
from saerl_cli.rl.evaluation.measure import mean_and_error
from saerl_cli.rl.policy import Policy

FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """a an the this that these those i you he she it we they me him her us them my your his its our their is are
        was were be been being am do does did have has had will would can could shall should may might must not no nor
        and or but if then than so as at by for from in into of off on onto out over to up with without about after
        before there here who whom which what when where why how all any both each few more most other some such only
        own same too very""",
    )
)
"""English words of grammar rather than of content."""

DOMINATES = 0.5
"""Share of a feature's activation that lies on tokens of a kind for it to be called so."""
POSITIONAL = 0.3
"""|correlation| of a feature's activation with log position in the document from which it counts as positional."""
LEADS = 2.0
"""How much more often than on average a rewarded token must follow where a feature fires, for it to fire before one."""
WRITES = 1.0
"""Mean logit effect on the rewarded tokens, in standard deviations over the vocabulary, from which a feature writes."""


@dataclass
class Firing:
    """Where features fire on held-out text: pairs (token, feature) with f != 0."""

    rows: Tensor
    """[rows, context] token ids."""
    text: Tensor
    """[rows, context], which of them are text; n in all."""
    token: Tensor
    """[pairs] index among the n."""
    feature: Tensor
    """[pairs] index among the F."""
    value: Tensor
    """[pairs] activation."""
    effect: Tensor
    """[F] mean norm of what the coefficient adds to the stream: E |f' - f| * |W_dec|, hence |delta| E[f] |W_dec|."""

    @property
    def ids(self) -> Tensor:
        """[n] ids of the text tokens."""
        return self.rows[self.text]

    def sums(self, weights: Tensor) -> Tensor:
        """Sum over tokens of activation times a weight a token, [n] -> [F], float64."""
        terms = self.value.double() * weights.double()[self.token]
        return torch.zeros(len(self.effect), dtype=torch.float64).index_add(0, self.feature, terms)

    def dense(self, features: range) -> Tensor:
        """Activations of a range of features, [n, len(features)]."""
        chosen = (self.feature >= features.start) & (self.feature < features.stop)
        f = torch.zeros(int(self.text.sum()), len(features))
        f[self.token[chosen], self.feature[chosen] - features.start] = self.value[chosen]
        return f


@torch.no_grad()
def firing(policy: Policy, coefficients: Coefficients, rows: Tensor) -> Firing:
    """Activations of the features that moved on packed held-out rows [rows, context]."""
    text = text_mask(rows, special_ids(policy.tokenizer))
    layers = site_layers(policy.model)
    with policy.model.disable_adapter():
        base = policy.model.get_base_model()
        sites = resolve_sites(coefficients.sites, base)
        parts = [capture(base, sites, part.to(base.device)) for part in rows.split(16)]
    token, feature, value = [], [], []
    effect = torch.zeros(len(coefficients))
    for site in sites:
        layer, here = layers[site.name], coefficients.at(site.name).nonzero()[:, 0]
        x = torch.cat([part[site.name] for part in parts])[text.to(base.device)]  # [n, d_in]
        wanted = coefficients.feature[here].to(x.device)
        changed = torch.zeros(len(here), dtype=torch.float64)
        for start in range(0, len(x), at_once := max(1, AT_ONCE // layer.sae.d_sae)):
            f, change = activations(layer, x[start : start + at_once])
            f = f[:, wanted].cpu()
            pairs = f.nonzero()
            token.append(pairs[:, 0] + start)
            feature.append(here[pairs[:, 1]])
            value.append(f[pairs[:, 0], pairs[:, 1]].float())
            changed += change[:, wanted].abs().sum(0, dtype=torch.float64).cpu()
        effect[here] = (changed / max(1, len(x))).float() * layer.sae.W_dec[wanted].norm(dim=-1).cpu()
    return Firing(rows, text, torch.cat(token), torch.cat(feature), torch.cat(value), effect)


def activations(layer: SparseCoeffLayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations f of the untouched SAE and what the coefficients add to them, [n, d_in] -> [n, d_sae] twice."""
    sae = layer.sae
    pre = sae.pre_activations(x.to(sae.W_dec.dtype))
    f = sae.activate(pre)
    total = layer.total(["default"])
    assert total is not None
    delta, shift = total
    return f, delta * f if shift is None else sae.activate((1 + delta) * pre + shift) - f


# --- words -----------------------------------------------------------------------------------------------------------


def rewarded_tokens(reward: RewardConfig, tokenizer: Any) -> list[int]:
    """Ids of the tokens that a reward counts one by one; empty where it judges otherwise."""
    found = []
    parts = [part for part in reward.parts.values() if part.weight]
    tests = [counted(part) for part in parts if (counted := kind_of(part).counted)]
    for i in range(len(tokenizer)):
        word = tokenizer.decode([i]).strip()
        if word and any(test(word) for test in tests):
            found.append(i)
    return found


def kind_of_word(word: str) -> str:
    """The kind of a token by its text."""
    if "\n" in word:
        return "newline"
    word = word.strip()
    if not any(character.isalnum() for character in word):
        return "punctuation"
    if any(character.isdigit() for character in word):
        return "number"
    return "function word" if word.lower() in FUNCTION_WORDS else "other word"


def token_kinds(found: Firing, tokenizer: Any, rewarded: Sequence[int]) -> list[str]:
    """The kind of every feature, F of them: what most of its activation lies on, or `position`, `mixed`, `silent`.

    The rewarded tokens are a kind of their own; positional is a feature of no such kind whose activation goes with its
    place in the document.
    """
    of_id = {i: kind_of_word(tokenizer.decode([i])) for i in set(found.ids.tolist())} | dict.fromkeys(
        rewarded, "rewarded"
    )
    kinds = sorted(set(of_id.values()))
    kind = torch.tensor([kinds.index(of_id[i]) for i in found.ids.tolist()])
    mass = torch.stack([found.sums(kind == k) for k in range(len(kinds))])  # [kinds, F]
    total = mass.sum(0)
    share, best = (mass / total.clamp_min(1e-30)).max(0)
    placed = position_correlation(found, tokenizer)
    names = []
    for i in range(len(total)):
        if total[i] == 0:
            names.append("silent")
        elif share[i] >= DOMINATES and (kinds[int(best[i])] != "other word" or abs(placed[i]) < POSITIONAL):
            names.append(kinds[int(best[i])])
        else:
            names.append("position" if abs(placed[i]) >= POSITIONAL else "mixed")
    return names


def places(found: Firing, rewarded: Sequence[int]) -> list[str]:
    """Where each feature fires: `on` rewarded tokens, `before` one, or `elsewhere`; F of them.

    Before one: of its activation LEADS times as much as of all tokens lies on tokens which a rewarded one follows.
    """
    worth = torch.isin(found.rows, torch.tensor(list(rewarded)))  # [rows, context]
    following = torch.cat([worth[:, 1:], torch.zeros_like(worth[:, :1])], 1)[found.text]  # [n]
    total = found.sums(torch.ones(len(following))).clamp_min(1e-30)
    on = found.sums(worth[found.text]) / total
    lift = found.sums(following) / total / following.double().mean().clamp_min(1e-30)
    return [
        "on" if o >= DOMINATES else "before" if b >= LEADS else "elsewhere"
        for o, b in zip(on.tolist(), lift.tolist(), strict=True)
    ]


def position_correlation(found: Firing, tokenizer: Any) -> Tensor:
    """Correlation over text tokens of each feature's activation with the log of the place in the document: [F]."""
    special = set(special_ids(tokenizer))
    places = []
    for row in found.rows.tolist():
        place = 0
        for i in row:
            place = 0 if i in special else place + 1
            places.append(place)
    x = torch.tensor(places).view_as(found.rows)[found.text].double().clamp_min(1).log()
    n, one = len(x), torch.ones(len(x))
    mean = found.sums(one) / n
    squares = torch.zeros_like(mean).index_add(0, found.feature, found.value.double() ** 2) / n
    covariance = found.sums(x - x.mean()) / n
    scale = (squares - mean**2).clamp_min(0).sqrt() * x.std(correction=0)
    return torch.where(scale > 1e-12, covariance / scale.clamp_min(1e-12), 0.0)


def fires_on(found: Firing, tokenizer: Any, features: Sequence[int], count: int = 4) -> dict[int, list[str]]:
    """The tokens with the largest summed activation of some features."""
    ids, result = found.ids, {}
    for i in features:
        here = found.feature == i
        sums: Counter[int] = Counter()
        for token, value in zip(ids[found.token[here]].tolist(), found.value[here].tolist(), strict=True):
            sums[token] += value
        result[i] = [shown(tokenizer, token) for token, _ in sums.most_common(count)]
    return result


# --- attributes and directions ---------------------------------------------------------------------------------------


def attributes_of(found: Firing, tokenizer: Any, at_once: int = 1024) -> list[tuple[str, float]]:
    """The attribute of the planted language that each feature detects best, and with which F1; F of them."""
    truth, names = truth_of(found.rows, found.text, tokenizer)
    graded: list[tuple[str, float]] = []
    for start in range(0, len(found.effect), at_once):
        f = found.dense(range(start, min(start + at_once, len(found.effect))))
        best = f1_scores(f, truth).max(dim=1)
        graded += [(names[i], f1) for i, f1 in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return graded


@torch.no_grad()
def writes(policy: Policy, coefficients: Coefficients, tokens: Sequence[int]) -> Tensor:
    """Mean direct effect of each feature's direction on the logits of some tokens, in deviations over the vocabulary.

    The effect of a direction d on the logits is U d, up to the final norm's scale (`saerl_cli.analysis.features`); with
    C the covariance of U's rows its standard deviation over the vocabulary is sqrt(d' C d). [F]
    """
    model = policy.model.get_base_model()
    unembedding = model.get_output_embeddings().weight.double()
    norm = final_norm(model)
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor):
        unembedding = unembedding * weight.double()
    if isinstance(norm, torch.nn.LayerNorm):
        unembedding = unembedding - unembedding.mean(1, keepdim=True)
    centred = unembedding - unembedding.mean(0)  # [V, d]
    towards, covariance = centred[list(tokens)].mean(0), centred.T @ centred / len(centred)
    result = torch.zeros(len(coefficients), dtype=torch.float64)
    for site, layer in site_layers(policy.model).items():
        here = coefficients.at(site)
        rows = layer.sae.W_dec[coefficients.feature[here].to(layer.sae.W_dec.device)]
        d = to_residual(model, layer.path, rows.float()).double()  # [features, d]
        spread = ((d @ covariance) * d).sum(1).clamp_min(1e-30).sqrt()
        result[here] = (d @ towards / spread).cpu()
    return result


def direction_names(z: Tensor) -> list[str]:
    """Whether each feature writes towards the rewarded tokens, away from them, or neither."""
    return ["towards" if v >= WRITES else "away" if v <= -WRITES else "neither" for v in z.tolist()]


def roles(attributes: Sequence[tuple[str, float]], rewarded: set[str], f1: float) -> list[str]:
    """`rewarded`, `after rewarded`, `other` or `unassigned` (F1 too small) of every feature."""
    names = []
    for name, grade in attributes:
        if grade < f1:
            names.append("unassigned")
        elif name in rewarded:
            names.append("rewarded")
        else:
            names.append("after rewarded" if name.removeprefix("after_") in rewarded else "other")
    return names


def sums_by(names: Sequence[str], attributions: Tensor, effect: Tensor) -> dict[str, dict[str, float]]:
    """Summed attribution of the features of each name, and its share of all; errors over prompts.

    Args:
        names: of every feature.
        attributions: [prompts, F].
        effect: [F], of which `effect_share` is the share: what chance would give.
    """
    whole = attributions.double().sum(1).tolist()
    found = {}
    for name in dict.fromkeys(sorted(names)):
        here = torch.tensor([i for i, other in enumerate(names) if other == name])
        part = attributions[:, here].double().sum(1).tolist()
        total, total_se = mean_and_error(part)
        share, share_se = ratio(part, whole)
        found[name] = {"features": len(here), "attribution": total, "attribution_se": total_se}
        found[name] |= {"share": share, "share_se": share_se}
        found[name]["effect_share"] = float(effect[here].double().sum() / effect.double().sum().clamp_min(1e-30))
    return dict(sorted(found.items(), key=lambda entry: -entry[1]["attribution"]))
