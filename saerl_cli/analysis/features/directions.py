"""What a feature's direction does: the logits it moves, the directions beside it.

Letters: `d` is the width of the residual stream, `V` the vocabulary, `C` the features looked at, `M` all of an SAE.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

FINAL_NORMS = ("gpt_neox.final_layer_norm", "model.norm", "transformer.ln_f", "model.decoder.final_layer_norm")
HIDDEN_TO_RESIDUAL = ("dense_4h_to_h", "down_proj", "c_proj", "fc2")
"""Names, in the families we know, of the linear map from an MLP's hidden layer to the residual stream."""


def final_norm(model: nn.Module) -> nn.Module | None:
    """The normalisation in front of the unembedding, where its name is known."""
    modules = dict(model.named_modules())
    return next((modules[name] for name in FINAL_NORMS if name in modules), None)


def to_residual(model: nn.Module, module: str, direction: Tensor) -> Tensor:
    """Decoder directions [..., d_in] as directions of the residual stream [..., d].

    Outputs of MLPs, attention and blocks are in the stream already; the MLP's hidden layer reaches it through the
    MLP's second linear map.
    """
    if not module.endswith(".act"):
        return direction
    parent = model.get_submodule(module.removesuffix(".act"))
    for name in HIDDEN_TO_RESIDUAL:
        linear = getattr(parent, name, None)
        if isinstance(linear, nn.Linear):
            return direction @ linear.weight.float().T  # [..., d_in] -> [..., d]
    raise ValueError(f"{module}: no linear map back to the residual stream among {', '.join(HIDDEN_TO_RESIDUAL)}")


@torch.no_grad()
def logit_effect(model: nn.Module, module: str, direction: Tensor) -> Tensor:
    """Direct effect of decoder directions [..., d_in] on the logits [..., V], up to the norm's positive scale.

    The final norm is linear once its scale is frozen: LayerNorm subtracts the mean over dimensions and multiplies by
    its weight, RMSNorm only multiplies (direct logit attribution, Elhage et al. 2021).
    """
    d = to_residual(model, module, direction.float())
    norm = final_norm(model)
    if isinstance(norm, nn.LayerNorm):
        d = d - d.mean(-1, keepdim=True)
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor):
        d = d * weight.float()
    unembedding = model.get_output_embeddings().weight.float()  # pyright: ignore[reportCallIssue]
    return d @ unembedding.T  # [..., d] @ [d, V]


def extreme_tokens(effect: Tensor, tokenizer: Any, n: int) -> tuple[list[str], list[str]]:
    """The `n` tokens that a logit effect [V] raises most, and the `n` it lowers most."""
    effect = effect[: len(tokenizer)]  # rows beyond the tokenizer decode to nothing
    n = min(n, len(effect))
    return (
        [shown(tokenizer, i) for i in effect.topk(n).indices.tolist()],
        [shown(tokenizer, i) for i in (-effect).topk(n).indices.tolist()],
    )


def shown(tokenizer: Any, token_id: int) -> str:
    """A token as a reader wants to see it: white space trimmed unless there is nothing else."""
    text = tokenizer.decode([token_id])
    return text.strip() or repr(piece(tokenizer, token_id))


@lru_cache(maxsize=2**16)
def piece(tokenizer: Any, token_id: int) -> str:
    """A token as it stands in the middle of a text, with its leading space: pieces put together are the text."""
    before = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]  # some decoders drop the first space of a text
    alone, both = tokenizer.decode(before), tokenizer.decode([*before, token_id])
    return both[len(alone) :] if both.startswith(alone) and len(both) > len(alone) else tokenizer.decode([token_id])


def nearest(decoder: Tensor, chosen: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The features whose directions are nearest to those of some.

    Args:
        decoder: [M, d_in].
        chosen: features, [C].
        n: neighbours a feature, at most.

    Returns:
        Cosines and features, [C, n] each, largest first; a feature is no neighbour of itself.
    """
    rows = normalize(decoder.float(), dim=-1)
    cosines = rows[chosen] @ rows.T  # [C, M]
    return largest_others(cosines, chosen, n)


def largest_others(scores: Tensor, chosen: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The `n` largest of each row of [C, M] and where they are, without column `chosen[i]` of row i."""
    scores = scores.clone()
    scores[torch.arange(len(chosen), device=scores.device), chosen] = float("-inf")
    best = scores.topk(min(n, scores.shape[1] - 1), dim=1)
    return best.values, best.indices
