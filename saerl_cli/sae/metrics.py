"""What a sparse autoencoder is worth, on held-out tokens: sums in float64, pooled over the set, special tokens out.

With x an activation, x^ its reconstruction, e = x^ - x, m the mean of x over the set, and sums over tokens:

    fvu           sum |e|^2 / sum |x - m|^2                   ev_legacy     mean of 1 - |e|^2 / |x - batch mean|^2
    l0            mean number of features that fire           l2_ratio      mean of |x^| / |x|
    gamma         sum |x^|^2 / sum x.x^  (shrinkage; 1 is none)
    ce_*          nats per token of the language model: untouched (base), with x^ in the place of x (spliced), with 0
                  (zero), with m (mean)
    ce_recovered  (ce_zero - ce_spliced) / (ce_zero - ce_base)
    kl_spliced    mean KL(base || spliced) per token, in nats
    dead_heldout  share of features that never fire on the set
    max_cosine    mean over features of the largest cosine of their direction with another's (decoder geometry)

`ev_legacy` is the explained variance of older papers; it depends on the batches.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from saerl_cli.activations import FORWARD_TOKENS, capture, text_mask
from saerl_cli.models import Site, output_tensor
from saerl_cli.sae.autoencoder import SAE

LOGITS_AT_ONCE = 2**26
"""Numbers in one batch of logits: 256 MB in float32."""
COSINES_AT_ONCE = 1024
"""Rows of the matrix of cosines between decoder directions held at once."""
DENSITY_EDGES = [-6.0, -5.5, -5.0, -4.5, -4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0]
"""log10 of the share of tokens on which a feature fires."""
Sums = dict[str, Tensor]
Reduce = Callable[[Tensor], Tensor]


def evaluate_saes(
    model: Any,
    sites: Sequence[Site],
    saes: Mapping[str, SAE],
    rows: Tensor,
    special: Sequence[int],
    reduce: Reduce = lambda tensor: tensor,
) -> dict[str, dict[str, Any]]:
    """All metrics of several SAEs of one model, by site name.

    Args:
        model: the language model.
        sites: where the SAEs belong.
        saes: by site name.
        rows: held-out token ids, [rows, context_size]; with several processes, this process's share.
        special: token ids to leave out.
        reduce: sums a tensor over all processes.

    Returns:
        For each site the keys above, `density` (how many features have which firing rate), `firing_rate` [d_sae].
    """
    totals: dict[str, Sums] = {site.name: {} for site in sites}
    for ids, text in _chunks(model, rows, special, FORWARD_TOKENS):
        for name, x in capture(model, sites, ids).items():
            add(totals[name], reconstruction_sums(saes[name], x[text].float()))
    for sums in totals.values():
        for key, value in sums.items():
            sums[key] = reduce(value)
    losses = language_losses(model, sites, saes, {n: s["x"] / s["n"] for n, s in totals.items()}, rows, special, reduce)
    return {
        site.name: reconstruction_metrics(totals[site.name])
        | losses[site.name]
        | {"max_cosine": max_cosine(saes[site.name].W_dec)}
        for site in sites
    }


def max_cosine(decoder: Tensor) -> float:
    """Mean over features of the largest cosine of a decoder row with any other row; near 1 where features repeat.

    Args:
        decoder: [d_sae, d_in].
    """
    if len(decoder) < 2:
        return 0.0
    rows = torch.nn.functional.normalize(decoder.float(), dim=-1)
    total = 0.0
    for start in range(0, len(rows), COSINES_AT_ONCE):
        cosines = rows[start : start + COSINES_AT_ONCE] @ rows.T  # [part, d_sae]
        own = torch.arange(len(cosines), device=rows.device)
        cosines[own, own + start] = -1.0
        total += cosines.max(dim=1).values.double().sum().item()
    return total / len(rows)


def add(total: Sums, part: Sums) -> None:
    """Add sums to sums."""
    for key, value in part.items():
        total[key] = total[key] + value if key in total else value


# --- reconstruction --------------------------------------------------------------------------------------------------


@torch.no_grad()
def reconstruction_sums(sae: SAE, x: Tensor) -> Sums:
    """The sums, over the tokens of x [n, d_in], from which `reconstruction_metrics` is computed; all float64."""
    f = sae.encode(x)
    reconstruction = sae.decode(f).double()
    x = x.double()
    error = (reconstruction - x).square().sum(-1)  # [n]
    spread = (x - x.mean(0)).square().sum(-1)
    fired = f != 0
    return {
        "n": torch.tensor(len(x), dtype=torch.float64, device=x.device),
        "x": x.sum(0),
        "x2": x.square().sum(),
        "e2": error.sum(),
        "legacy": (1 - error / spread.clamp_min(1e-30)).sum(),
        "active": fired.sum().double(),
        "fired": fired.sum(0).double(),
        "r2": reconstruction.square().sum(),
        "xr": (x * reconstruction).sum(),
        "ratio": (reconstruction.norm(dim=-1) / x.norm(dim=-1).clamp_min(1e-30)).sum(),
    }


def reconstruction_metrics(sums: Sums) -> dict[str, Any]:
    """The metrics that need no language model, from pooled sums."""
    n = float(sums["n"])
    variance = float(sums["x2"] - sums["x"].square().sum() / n)
    rate = sums["fired"] / n  # [d_sae]
    return {
        "fvu": float(sums["e2"]) / max(variance, 1e-30),
        "ev_legacy": float(sums["legacy"]) / n,
        "l0": float(sums["active"]) / n,
        "l2_ratio": float(sums["ratio"]) / n,
        "gamma": float(sums["r2"]) / max(float(sums["xr"]), 1e-30),
        "dead_heldout": float((rate == 0).double().mean()),
        "density": density(rate),
        "firing_rate": rate,
        "tokens_heldout": int(n),
    }


def density(rate: Tensor) -> dict[str, list[float]]:
    """Histogram of log10 firing rates [d_sae]; features that never fire are left out."""
    logs = rate[rate > 0].log10().clamp(DENSITY_EDGES[0], DENSITY_EDGES[-1])
    counts = torch.histogram(logs.cpu(), torch.tensor(DENSITY_EDGES, dtype=logs.dtype)).hist
    return {"log10_edges": DENSITY_EDGES, "features": counts.int().tolist()}


# --- the language model's loss ---------------------------------------------------------------------------------------


@torch.no_grad()
def language_losses(
    model: Any,
    sites: Sequence[Site],
    saes: Mapping[str, SAE],
    means: Mapping[str, Tensor],
    rows: Tensor,
    special: Sequence[int],
    reduce: Reduce = lambda tensor: tensor,
) -> dict[str, dict[str, float]]:
    """Cross-entropy of the next token with each site's output replaced, at one site at a time.

    Special tokens keep their activations, and are not predicted.

    Args:
        model: the language model.
        sites: where to splice.
        saes: by site name.
        means: mean activation by site name, [d_in].
        rows: token ids, [rows, context_size].
        special: token ids to leave out.
        reduce: sums a tensor over all processes.
    """
    sums: dict[str, Sums] = {site.name: {} for site in sites}
    at_once = min(FORWARD_TOKENS, LOGITS_AT_ONCE // model.config.vocab_size)
    for ids, text in _chunks(model, rows, special, at_once):
        target, kept = ids[:, 1:], text[:, 1:]
        base = _log_probabilities(model, ids)[kept]  # [n, vocabulary]
        target = target[kept][:, None]
        base_loss = -base.gather(1, target).double().sum()
        for site in sites:
            sae, mean = saes[site.name], means[site.name].float()
            splices: dict[str, Callable[[Tensor], Tensor]] = {
                "spliced": sae.forward,
                "zero": torch.zeros_like,
                "mean": lambda x, mean=mean: mean.expand_as(x),
            }
            part = {"n": kept.sum().double(), "base": base_loss}
            for name, replacement in splices.items():
                changed = _log_probabilities(model, ids, site, replacement, text)[kept]
                part[name] = -changed.gather(1, target).double().sum()
                if name == "spliced":
                    part["kl"] = (base.exp() * (base - changed)).sum(-1).double().sum()
            add(sums[site.name], part)
    return {name: _losses({key: float(reduce(value)) for key, value in part.items()}) for name, part in sums.items()}


def _losses(sums: dict[str, float]) -> dict[str, float]:
    n = sums["n"]
    losses = {f"ce_{name}": sums[name] / n for name in ("base", "spliced", "zero", "mean")}
    room = losses["ce_zero"] - losses["ce_base"]
    # A site whose ablation costs nothing has no room to recover; 0 says so without a NaN.
    recovered = (losses["ce_zero"] - losses["ce_spliced"]) / room if abs(room) > 1e-9 else 0.0
    return losses | {"ce_recovered": recovered, "kl_spliced": sums["kl"] / n}


def _log_probabilities(
    model: Any,
    ids: Tensor,
    site: Site | None = None,
    replacement: Callable[[Tensor], Tensor] | None = None,
    text: Tensor | None = None,
) -> Tensor:
    """Log-probabilities of the next token, [batch, seq - 1, vocabulary]; text positions of a site may be replaced."""

    def splice(module: Any, args: Any, output: Any) -> Any:
        assert replacement is not None and text is not None
        x = output_tensor(output)
        new = torch.where(text[..., None], replacement(x.float()).to(x.dtype), x)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    hook = model.get_submodule(site.module).register_forward_hook(splice) if site else None
    try:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    finally:
        if hook:
            hook.remove()
    return logits.float().log_softmax(-1)


def _chunks(model: Any, rows: Tensor, special: Sequence[int], tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows in chunks of about `tokens` tokens on the model's device, with their text masks."""
    device = model.get_input_embeddings().weight.device
    for chunk in rows.split(max(1, tokens // rows.shape[1])):
        yield chunk.to(device), text_mask(chunk, special).to(device)


# --- planted truth ---------------------------------------------------------------------------------------------------


def attribute_scores(f: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """For each attribute the feature that detects it best.

    The feature is the one whose firing has the highest F1 as a detector of the attribute's tokens; `auroc` is the
    chance that its activation is higher on a token of the attribute than on another (ties count half).

    Args:
        f: feature activations, [n, d_sae].
        labels: which attributes each token carries, bool [n, attributes].
        names: of the attributes.

    Returns:
        name -> {feature, f1, auroc, tokens}; attributes that no token or every token carries are left out.
    """
    fired = (f > 0).float()
    truth = labels.float()
    hits = truth.T @ fired  # [attributes, d_sae]
    f1 = 2 * hits / (truth.sum(0)[:, None] + fired.sum(0)).clamp_min(1)
    scores = {}
    for index, name in enumerate(names):
        positive = int(labels[:, index].sum())
        if 0 < positive < len(f):
            feature = int(f1[index].argmax())
            scores[name] = {
                "feature": feature,
                "f1": float(f1[index, feature]),
                "auroc": auroc(f[:, feature], labels[:, index]),
                "tokens": positive,
            }
    return scores


def auroc(score: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve: P(score of a positive > score of a negative) + half of P(equal).

    Args:
        score: [n].
        positive: bool [n], with both kinds present.
    """
    _, group, sizes = torch.unique(score, return_inverse=True, return_counts=True)
    last = sizes.double().cumsum(0)
    rank = (last - (sizes.double() - 1) / 2)[group]  # mean rank among ties, from 1
    p = float(positive.sum())
    return (float(rank[positive].sum()) - p * (p + 1) / 2) / (p * (len(score) - p))
