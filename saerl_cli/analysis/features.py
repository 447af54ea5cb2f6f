"""What a feature is: the tokens that fire it, the tokens its direction promotes, the attribute it stands for.

Letters: `d` is the width of the residual stream, `V` the vocabulary, `M` the number of features of an SAE.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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


def most_fired_tokens(f: Tensor, token_ids: Tensor, tokenizer: Any, n: int) -> list[str]:
    """Tokens by summed activation of one feature, largest first.

    Args:
        f: activations [tokens].
        token_ids: the token at each of them [tokens].
        tokenizer: decodes them.
        n: how many at most; tokens that never fire the feature are left out.
    """
    total = torch.zeros(int(token_ids.max()) + 1).index_add_(0, token_ids, f.float())  # [V]
    best = total.topk(min(n, len(total)))
    return [shown(tokenizer, i) for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True) if v > 0]


def as_records(features: list[MovedFeature]) -> list[dict]:
    """Plain dictionaries, for JSON."""
    return [asdict(feature) for feature in features]


def features_file(run: Path) -> Path:
    """Where a run keeps what `moved_features` found."""
    return run / "features.json"
