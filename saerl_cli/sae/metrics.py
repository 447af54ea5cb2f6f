"""What a sparse autoencoder is worth, on held-out tokens: sums in float64, pooled over the set, special tokens out.

With x an activation, x^ its reconstruction, e = x^ - x, m the mean of x over the set, and sums over tokens:

    fvu           sum |e|^2 / sum |x - m|^2                   ev_legacy     mean of 1 - |e|^2 / |x - batch mean|^2
    l0            mean number of features that fire           l2_ratio      mean of |x^| / |x|
    gamma         sum |x^|^2 / sum x.x^  (shrinkage; 1 is none; arXiv 2404.16014)
    cosine        mean of cos(x, x^)
    ce_*          nats per token of the language model: untouched (base), with x^ in the place of x (spliced), with 0
                  (zero), with m (mean)
    ce_recovered  (ce_zero - ce_spliced) / (ce_zero - ce_base)
    kl_*          mean KL(base || spliced), KL(base || zero) per token, in nats
    kl_recovered  1 - kl_spliced / kl_zero
    dead_heldout  share of features that never fire on the set
    rare, dense   shares that fire on less than 1e-5, on more than 0.1 of the tokens
    rare_cluster  share of the rare whose encoder direction has a cosine above 0.95 with their mean (Nanda 2023)
    max_cosine    mean over features of the largest cosine of their direction with another's (decoder geometry)
    encoder_decoder_cosine   mean over features of the cosine of what they read with what they write

Those of the first two groups come with standard errors, `NAME_se` (`saerl_cli.sae.jackknife`). For a transcoder x^ is
its prediction from another site and x the activation at its target, which is where x^, 0 and m are put.
`beats_mean` is fvu < 1: with 1 or more, the mean of all activations is the better reconstruction. `ev_legacy` is the
explained variance of older papers; it depends on the batches.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from saerl_cli.activations import FORWARD_TOKENS, capture, text_mask
from saerl_cli.models import Site, output_tensor, resolve_sites
from saerl_cli.run import shards
from saerl_cli.run.processes import ProcessGroup
from saerl_cli.sae.autoencoder import SAE
from saerl_cli.sae.jackknife import Reduce, Sums, alone, by_row, jackknife, joined, pooled

LOGITS_AT_ONCE = 2**26
"""Numbers in one batch of logits: 256 MB in float32."""
COSINES_AT_ONCE = 1024
"""Rows of the matrix of cosines between decoder directions held at once."""
DENSITY_EDGES = [-6.0, -5.5, -5.0, -4.5, -4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0]
"""log10 of the share of tokens on which a feature fires."""
RARE, DENSE = 1e-5, 0.1
"""Firing rates below and above which a feature is called rare and dense."""
ALIKE = 0.95
"""Cosine with the mean direction of the rare features from which one belongs to their cluster."""
TINY = 1e-30

Place = tuple[Site, Site]
"""Where an SAE reads, and where what it writes belongs: the same but for a transcoder."""


def evaluate_saes(
    model: Any,
    sites: Sequence[Site],
    saes: Mapping[str, SAE],
    rows: Tensor,
    special: Sequence[int],
    reduce: Reduce = alone,
) -> dict[str, dict[str, Any]]:
    """All metrics of several SAEs of one model, by name; they share the model's forward passes.

    Args:
        model: the language model.
        sites: where the SAEs belong.
        saes: by any name, `sae.site` says where; by that of their site where it does not.
        rows: held-out token ids, [rows, context_size]; with several processes, this process's share.
        special: token ids to leave out.
        reduce: sums a tensor over all processes.

    Returns:
        For each SAE the keys above, `density` (how many features have which firing rate), `firing_rate` [d_sae].
    """
    places = {name: place(name, sae, sites, model) for name, sae in saes.items()}
    if len(rows) == 0:  # a process without a share must reduce with the others: a row without text adds nothing
        rows = rows.new_full((1, rows.shape[1]), special[0])
    sums, fired = reconstructions(model, saes, places, rows, special)
    totals = {name: pooled(part, reduce) for name, part in sums.items()}
    means = {places[name][1].name: total["y"] / total["n"] for name, total in totals.items()}
    losses = language_losses(model, saes, places, means, rows, special)
    found = {}
    for name, sae in saes.items():
        rate = reduce(fired[name]) / totals[name]["n"]  # [d_sae]
        numbers = jackknife(sums[name], reconstruction_statistics, reduce)
        found[name] = (
            numbers
            | jackknife(losses[name], loss_statistics, reduce)
            | {"beats_mean": numbers["fvu"] < 1, "tokens_heldout": int(totals[name]["n"])}
            | firing(rate, sae)
            | geometry(sae)
        )
    return found


def place(name: str, sae: SAE, sites: Sequence[Site], model: Any) -> Place:
    """Where an SAE reads and where what it writes belongs."""
    by_name = {site.name: site for site in sites}
    source = by_name.get(sae.site or name) or by_name.get(name)
    if source is None:
        raise ValueError(f"the SAE {name} belongs to {sae.site}, which is none of {', '.join(by_name)}")
    if sae.target is None:
        return source, source
    return source, by_name.get(sae.target) or resolve_sites([sae.target], model)[0]


# --- reconstruction --------------------------------------------------------------------------------------------------


def reconstructions(
    model: Any, saes: Mapping[str, SAE], places: Mapping[str, Place], rows: Tensor, special: Sequence[int]
) -> tuple[dict[str, Sums], dict[str, Tensor]]:
    """By SAE, the sums over every row that `reconstruction_statistics` needs, and how often each feature fired."""
    sites = list({site.name: site for pair in places.values() for site in pair}.values())
    parts: dict[str, list[Sums]] = {name: [] for name in saes}
    fired: dict[str, Tensor] = {}
    for ids, text in _chunks(model, rows, special, FORWARD_TOKENS):
        row = text.nonzero()[:, 0]
        found = {name: x[text].float() for name, x in capture(model, sites, ids).items()}  # [n, width]
        for name, sae in saes.items():
            source, target = places[name]
            values, count = token_values(sae, found[source.name], found[target.name])
            parts[name].append(by_row(values, row, len(ids)))
            fired[name] = fired[name] + count if name in fired else count
    return {name: joined(part) for name, part in parts.items()}, fired


@torch.no_grad()
def token_values(sae: SAE, x: Tensor, y: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """Per token the numbers whose sums `reconstruction_statistics` takes, float64 [n, ...]; and firings, [d_sae].

    Args:
        sae: the autoencoder.
        x: activations that it reads, [n, d_in].
        y: what it should write, [n, d_out]; x when None.
    """
    f = sae.encode(x)
    reconstruction = sae.decode(f).double()
    y = (x if y is None else y).double()
    error = (reconstruction - y).square().sum(-1)  # [n]
    spread = (y - y.mean(0)).square().sum(-1)
    norm, length = y.norm(dim=-1).clamp_min(TINY), reconstruction.norm(dim=-1)
    product = (y * reconstruction).sum(-1)
    fired = f != 0
    values = {
        "n": torch.ones_like(error),
        "y": y,
        "y2": y.square().sum(-1),
        "e2": error,
        "legacy": 1 - error / spread.clamp_min(TINY),
        "active": fired.sum(-1).double(),
        "r2": length.square(),
        "yr": product,
        "ratio": length / norm,
        "cosine": product / (norm * length.clamp_min(TINY)),
    }
    return values, fired.sum(0).double()


def reconstruction_statistics(sums: Sums) -> dict[str, Tensor]:
    """The metrics that need no language model, from sums [...] (`y`: [..., d_out])."""
    n = sums["n"].clamp_min(1)
    variance = sums["y2"] - sums["y"].square().sum(-1) / n
    return {
        "fvu": sums["e2"] / variance.clamp_min(TINY),
        "ev_legacy": sums["legacy"] / n,
        "l0": sums["active"] / n,
        "l2_ratio": sums["ratio"] / n,
        "gamma": ratio(sums["r2"], sums["yr"], TINY),  # negative where the reconstruction points away
        "cosine": sums["cosine"] / n,
    }


# --- features --------------------------------------------------------------------------------------------------------


def firing(rate: Tensor, sae: SAE) -> dict[str, Any]:
    """How often features fire, from their rates [d_sae]: shares, the cluster of rare ones, the histogram."""
    rare = rate < RARE
    return {
        "dead_heldout": float((rate == 0).double().mean()),
        "rare": float(rare.double().mean()),
        "dense": float((rate > DENSE).double().mean()),
        "rare_cluster": rare_cluster(sae.W_enc[:, rare]),
        "density": density(rate),
        "firing_rate": rate,
    }


def rare_cluster(encoder: Tensor) -> float:
    """Share of directions [d_in, rare] whose cosine with their mean direction exceeds 0.95; 0 for fewer than two."""
    if encoder.shape[1] < 2:
        return 0.0
    directions = normalize(encoder.float(), dim=0)
    centre = normalize(directions.mean(1), dim=0)
    return float((centre @ directions > ALIKE).double().mean())


def density(rate: Tensor) -> dict[str, list[float]]:
    """Histogram of log10 firing rates [d_sae]; features that never fire are left out."""
    logs = rate[rate > 0].log10().clamp(DENSITY_EDGES[0], DENSITY_EDGES[-1])
    counts = torch.histogram(logs.cpu(), torch.tensor(DENSITY_EDGES, dtype=logs.dtype)).hist
    return {"log10_edges": DENSITY_EDGES, "features": counts.int().tolist()}


def geometry(sae: SAE) -> dict[str, float]:
    """How directions lie to each other; a transcoder reads and writes in different spaces, which have no angle."""
    numbers = {"max_cosine": max_cosine(sae.W_dec)}
    if not sae.transcoder:
        cosine = cosine_similarity(sae.W_enc.T.float(), sae.W_dec.float(), dim=-1)  # [d_sae]
        numbers["encoder_decoder_cosine"] = float(cosine.double().mean())
    return numbers


def max_cosine(decoder: Tensor) -> float:
    """Mean over features of the largest cosine of a decoder row with any other row; near 1 where features repeat.

    Args:
        decoder: [d_sae, d_in].
    """
    if len(decoder) < 2:
        return 0.0
    rows = normalize(decoder.float(), dim=-1)
    total = 0.0
    for start in range(0, len(rows), COSINES_AT_ONCE):
        cosines = rows[start : start + COSINES_AT_ONCE] @ rows.T  # [part, d_sae]
        own = torch.arange(len(cosines), device=rows.device)
        cosines[own, own + start] = -1.0
        total += cosines.max(dim=1).values.double().sum().item()
    return total / len(rows)


# --- the language model's loss ---------------------------------------------------------------------------------------


@torch.no_grad()
def language_losses(
    model: Any,
    saes: Mapping[str, SAE],
    places: Mapping[str, Place],
    means: Mapping[str, Tensor],
    rows: Tensor,
    special: Sequence[int],
) -> dict[str, Sums]:
    """By SAE, sums over every row of the loss of the next token, with one site's output replaced at a time.

    Special tokens keep their activations, and are not predicted.

    Args:
        model: the language model.
        saes: by name.
        places: by name.
        means: mean activation by name of the site, [width].
        rows: token ids, [rows, context_size].
        special: token ids to leave out.
    """
    targets = {target.name: target for _, target in places.values()}
    parts: dict[str, list[Sums]] = {name: [] for name in saes}
    at_once = min(FORWARD_TOKENS, LOGITS_AT_ONCE // model.config.vocab_size)
    for ids, text in _chunks(model, rows, special, at_once):
        kept = text[:, 1:]
        row, chosen = kept.nonzero()[:, 0], ids[:, 1:][kept][:, None]

        def measured(kept: Tensor = kept, chosen: Tensor = chosen, ids: Tensor = ids) -> tuple[Tensor, Tensor]:
            logp = model(input_ids=ids, use_cache=False).logits[:, :-1][kept].float().log_softmax(-1)
            return logp, -logp.gather(1, chosen)[:, 0].double()  # [n, vocabulary], [n]

        base, base_loss = measured()
        probability = base.exp()
        shared: dict[str, dict[str, Tensor]] = {}  # ablations are the same for all SAEs of a site
        for name, site in targets.items():
            mean = means[name].float()
            with replaced(model, site, site, torch.zeros_like, text):
                logp, zero = measured()
            with replaced(model, site, site, lambda x, mean=mean: mean.expand_as(x), text):
                _, mean_loss = measured()
            divergence = (probability * (base - logp)).sum(-1)
            shared[name] = {"zero": zero, "mean": mean_loss, "kl_zero": divergence}
        for name, sae in saes.items():
            source, target = places[name]
            with replaced(model, source, target, sae.forward, text):
                logp, loss = measured()
            divergence = (probability * (base - logp)).sum(-1)
            values = {"n": torch.ones_like(loss), "base": base_loss, "spliced": loss, "kl": divergence}
            parts[name].append(by_row(values | shared[target.name], row, len(ids)))
    return {name: joined(part) for name, part in parts.items()}


def loss_statistics(sums: Sums) -> dict[str, Tensor]:
    """The metrics of `language_losses`, from sums [...]."""
    n = sums["n"].clamp_min(1)
    losses = {f"ce_{name}": sums[name] / n for name in ("base", "spliced", "zero", "mean")}
    kl, kl_zero = sums["kl"] / n, sums["kl_zero"] / n
    return losses | {
        "ce_recovered": ratio(losses["ce_zero"] - losses["ce_spliced"], losses["ce_zero"] - losses["ce_base"]),
        "kl_spliced": kl,
        "kl_zero": kl_zero,
        "kl_recovered": ratio(kl_zero - kl, kl_zero),
    }


def ratio(part: Tensor, whole: Tensor, least: float = 1e-9) -> Tensor:
    """`part / whole`, 0 without a whole: a site whose ablation costs nothing has nothing to recover, and no NaN."""
    none = whole.abs() <= least
    return torch.where(none, 0.0, part / torch.where(none, 1.0, whole))


@contextmanager
def replaced(
    model: Any, source: Site, target: Site, replacement: Callable[[Tensor], Tensor], text: Tensor
) -> Iterator[None]:
    """Inside the block, every text position of `target` becomes `replacement` of `source` in the same forward pass.

    Args:
        model: the language model.
        source: what the replacement reads; it may be the target itself.
        target: whose output changes.
        replacement: [..., width of source] -> [..., width of target], float32.
        text: which positions are text, bool [batch, seq]; the others stay as they are.
    """
    seen: list[Tensor] = []

    def read(module: Any, args: Any, output: Any) -> None:
        seen[:] = [output_tensor(output)]

    def write(module: Any, args: Any, output: Any) -> Any:
        y = output_tensor(output)
        if not seen:
            raise ValueError(f"{source.name} does not run before {target.name}, which it should predict")
        new = torch.where(text[..., None], replacement(seen.pop().float()).to(y.dtype), y)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    # Hooks run in the order of their making, so that a site that replaces itself is read first.
    hooks = [
        model.get_submodule(source.module).register_forward_hook(read),
        model.get_submodule(target.module).register_forward_hook(write),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def first_rows(rows: Tensor, special: Sequence[int], tokens: int) -> Tensor:
    """As many rows from the start as hold `tokens` tokens of text, or all."""
    before = text_mask(rows, special).sum(1).cumsum(0)
    return rows[: int((before < tokens).sum()) + 1]


def shared_rows(rows: Tensor, group: ProcessGroup) -> Tensor:
    """The rows of one process, [its rows, context_size]: whole chunks, so that what is measured in one stays the same.

    Args:
        rows: all, [rows, context_size].
        group: the processes.
    """
    chunks = rows.split(max(1, FORWARD_TOKENS // rows.shape[1]))[group.rank :: group.world_size]
    return torch.cat(chunks) if chunks else rows[:0]


def _chunks(model: Any, rows: Tensor, special: Sequence[int], tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows in chunks of about `tokens` tokens on the model's device, with their text masks."""
    device = model.get_input_embeddings().weight.device
    for chunk in rows.split(max(1, tokens // rows.shape[1])):
        yield chunk.to(device), text_mask(chunk, special).to(device)
    shards.barrier()


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
    p = float(positive.sum())
    return (float(midrank(score)[positive].sum()) - p * (p + 1) / 2) / (p * (len(score) - p))


def midrank(score: Tensor) -> Tensor:
    """Rank of each score from 1, float64 [n]; equal scores share the mean of theirs."""
    _, group, sizes = torch.unique(score, return_inverse=True, return_counts=True)
    return (sizes.double().cumsum(0) - (sizes.double() - 1) / 2)[group]
