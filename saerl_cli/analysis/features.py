"""What a feature is: the tokens that fire it, the tokens its direction promotes, the attribute it stands for.

Letters: `d` is the width of the residual stream, `V` the vocabulary, `M` the number of features of an SAE.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saerl_cli.activations import capture, documents, row_length, special_ids, text_mask, token_rows
from saerl_cli.adapter.files import check_adapter, read_deltas
from saerl_cli.config.adapter import COEFFICIENTS
from saerl_cli.config.groups import ModelKind
from saerl_cli.models import Loaded, Site, load_model, resolve_sites
from saerl_cli.rl.runs import policy_folder, run_config
from saerl_cli.run.files import write_json
from saerl_cli.sae.autoencoder import SAE
from saerl_cli.sae.describe import top_tokens
from saerl_cli.sae.files import load_sae

FINAL_NORMS = ("gpt_neox.final_layer_norm", "model.norm", "transformer.ln_f", "model.decoder.final_layer_norm")
HIDDEN_TO_RESIDUAL = ("dense_4h_to_h", "down_proj", "c_proj", "fc2")
"""Names, in the families we know, of the linear map from an MLP's hidden layer to the residual stream."""


@dataclass
class MovedFeature:
    """A coefficient that RLHF moved, with what its feature is."""

    site: str
    feature: int
    delta: float
    """c - 1: 0 is untouched, -1 switches the feature off."""
    density: float
    """Share of held-out tokens on which the feature fires."""
    effect: float
    """Mean norm of what the coefficient adds to the stream: |delta| * E[f] * |W_dec|."""
    fires_on: list[str]
    """Tokens with the largest summed activation, largest first."""
    promotes: list[str]
    """Tokens whose logit the decoder direction raises most."""
    suppresses: list[str]
    """Tokens whose logit it lowers most."""
    contexts: list[list[tuple[str, float]]]
    """Strongest held-out contexts: (token, activation) pairs."""
    attribute: str = ""
    """Best matching attribute of the embedded language, empty elsewhere."""
    f1: float | None = None
    """F1 of "the feature fires" as a detector of that attribute's tokens."""


def final_norm(model: nn.Module) -> nn.Module | None:
    """The normalisation in front of the unembedding, where its name is known."""
    modules = dict(model.named_modules())
    return next((modules[name] for name in FINAL_NORMS if name in modules), None)


def to_residual(model: nn.Module, module: str, direction: Tensor) -> Tensor:
    """A decoder direction [d_in] as a direction of the residual stream [d].

    Outputs of MLPs, attention and blocks are in the stream already; the MLP's hidden layer reaches it through the
    MLP's second linear map.
    """
    if not module.endswith(".act"):
        return direction
    parent = model.get_submodule(module.removesuffix(".act"))
    for name in HIDDEN_TO_RESIDUAL:
        linear = getattr(parent, name, None)
        if isinstance(linear, nn.Linear):
            return direction @ linear.weight.float().T  # [d_in] -> [d]
    raise ValueError(f"{module}: no linear map back to the residual stream among {', '.join(HIDDEN_TO_RESIDUAL)}")


def logit_effect(model: nn.Module, module: str, direction: Tensor) -> Tensor:
    """Direct effect of a decoder direction [d_in] on the logits [V], up to the norm's positive scale.

    The final norm is linear once its scale is frozen: LayerNorm subtracts the mean over dimensions and multiplies by
    its weight, RMSNorm only multiplies (direct logit attribution, Elhage et al. 2021).
    """
    d = to_residual(model, module, direction.float())
    norm = final_norm(model)
    if isinstance(norm, nn.LayerNorm):
        d = d - d.mean()
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor):
        d = d * weight.float()
    unembedding = model.get_output_embeddings().weight.float()  # pyright: ignore[reportCallIssue]
    return unembedding @ d  # [V, d] @ [d] -> [V]


def extreme_tokens(effect: Tensor, tokenizer: Any, n: int) -> tuple[list[str], list[str]]:
    """The `n` tokens that a logit effect [V] raises most, and the `n` it lowers most."""
    effect = effect[: len(tokenizer)]  # rows beyond the tokenizer decode to nothing
    return (
        [shown(tokenizer, i) for i in effect.topk(n).indices.tolist()],
        [shown(tokenizer, i) for i in (-effect).topk(n).indices.tolist()],
    )


def shown(tokenizer: Any, token_id: int) -> str:
    """A token as a reader wants to see it: white space trimmed unless there is nothing else."""
    text = tokenizer.decode([token_id])
    return text.strip() or repr(text)


def strongest_contexts(f: Tensor, rows: Tensor, tokenizer: Any, n: int, width: int = 8) -> list[list]:
    """The `n` places where a feature fires most, one a row.

    Args:
        f: activations of one feature [rows, seq].
        rows: token ids [rows, seq].
        tokenizer: decodes them.
        n: how many.
        width: tokens shown before the place, half as many after it.
    """
    peak, where = f.max(dim=1)  # [rows]
    contexts = []
    for row in peak.topk(min(n, len(peak))).indices.tolist():
        if peak[row] <= 0:
            break
        at = int(where[row])
        first, last = max(0, at - width), min(rows.shape[1], at + width // 2 + 1)
        contexts.append(
            [(tokenizer.decode([int(rows[row, t])]), round(float(f[row, t]), 3)) for t in range(first, last)]
        )
    return contexts


def features_file(run: Path) -> Path:
    """Where a run keeps what `describe_run` found."""
    return run / "features.json"


# --- a run's features ------------------------------------------------------------------------------------------------


def describe_run(run: Path, count: int = 40, tokens: int = 20_000) -> dict[str, Any]:
    """What RLHF did to the features of a finished coefficient run; also written to RUN/features.json.

    Activations are those of the untouched model on held-out text: what a feature is, not what it has become.

    Args:
        run: run directory of `saerl rlhf --sparse-coeffs`.
        count: features described, by effect.
        tokens: held-out tokens read, at most.

    Returns:
        `features`: `MovedFeature` as dictionaries, largest effect first; `deltas`: site -> delta of every feature.

    Raises:
        ValueError: no finished run of that kind.
    """
    config = run_config(run)
    if config.adapter.kind not in COEFFICIENTS:
        raise ValueError(f"{run} trained adapter={config.adapter.kind.value}: it has no coefficients of features")
    folder = policy_folder(run, config)
    adapter, deltas = check_adapter(folder), read_deltas(folder)
    loaded = load_model(config.model)
    length = row_length(config.data, loaded.context_size)
    rows = token_rows(documents(config.data, config.model, "heldout"), loaded.tokenizer, length)
    rows = rows[: max(1, tokens // length)]
    sites = {site.name: site for site in resolve_sites(list(deltas), loaded.model)}
    planted = config.model.kind is ModelKind.planted
    moved: list[MovedFeature] = []
    for name, delta in deltas.items():
        sae = load_sae(adapter.find_sae(sites[name].module))
        moved += moved_features(loaded, sites[name], sae, delta, rows, count, planted)
    moved.sort(key=lambda feature: -feature.effect)
    found = {
        "features": [asdict(feature) for feature in moved[:count]],
        "deltas": {name: [round(float(d), 6) for d in delta] for name, delta in deltas.items()},
    }
    write_json(features_file(run), found)
    return found


@torch.no_grad()
def moved_features(
    loaded: Loaded, site: Site, sae: SAE, delta: Tensor, rows: Tensor, count: int, planted: bool = False
) -> list[MovedFeature]:
    """The features of a site whose coefficients changed most, by effect on held-out text.

    Args:
        loaded: the model.
        site: where the SAE is.
        sae: the SAE.
        delta: [d_sae].
        rows: held-out token ids [rows, seq].
        count: how many.
        planted: whether to name the attribute of the embedded language that each feature detects best.
    """
    special = special_ids(loaded.tokenizer)
    h = torch.cat([capture(loaded.model, [site], part)[site.name].float() for part in rows.split(16)])
    text = text_mask(rows, special)  # [rows, seq]
    f = sae.encode(h) * text[..., None]  # [rows, seq, d_sae]
    n = text.sum()
    effect = delta.abs() * (f.sum((0, 1)) / n) * sae.W_dec.norm(dim=-1)  # [d_sae]
    chosen = [i for i in effect.topk(min(count, len(effect))).indices.tolist() if delta[i] != 0]
    fired = top_tokens(sae, h[text], rows[text], 6, chosen)
    grades = (
        best_attributes(f[text][:, chosen], rows, text, loaded.tokenizer) if planted else [("", None)] * len(chosen)
    )
    found = []
    for feature, ids, (attribute, f1) in zip(chosen, fired, grades, strict=True):
        promotes, suppresses = extreme_tokens(
            logit_effect(loaded.model, site.module, sae.W_dec[feature]), loaded.tokenizer, 6
        )
        found.append(
            MovedFeature(
                site=site.name,
                feature=feature,
                delta=float(delta[feature]),
                density=float((f[..., feature] > 0).sum() / n),
                effect=float(effect[feature]),
                fires_on=[shown(loaded.tokenizer, i) for i in ids],
                promotes=promotes,
                suppresses=suppresses,
                contexts=strongest_contexts(f[..., feature], rows, loaded.tokenizer, 3),
                attribute=attribute,
                f1=f1,
            )
        )
    return found


def best_attributes(f: Tensor, rows: Tensor, text: Tensor, tokenizer: Any) -> list[tuple[str, float | None]]:
    """For each feature the attribute of the embedded language that its firing detects best, with the F1.

    Args:
        f: activations of the features on text tokens [n, features].
        rows: token ids [rows, seq].
        text: which of them are text [rows, seq], n in all.
        tokenizer: of the embedded language, a token a word.
    """
    from saerl_cli.world.language import ATTRIBUTES, labels_of

    carried = [labels_of(tokenizer.convert_ids_to_tokens(row)) for row in rows.tolist()]
    truth = torch.tensor([[[name in token for name in ATTRIBUTES] for token in row] for row in carried])[text].float()
    fired = (f > 0).float()
    hits = fired.T @ truth  # [features, attributes]
    f1 = 2 * hits / (fired.sum(0)[:, None] + truth.sum(0)).clamp_min(1)
    best = f1.max(dim=1)
    return [(ATTRIBUTES[i], float(v)) for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
