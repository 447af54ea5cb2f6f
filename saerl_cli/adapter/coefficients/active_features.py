"""The active features of many tokens, and what is computed with them alone.

A ReLU, JumpReLU or topk SAE has few active features a token. Behind the dense encoder product, decoding and the
gradient of the coefficients then need no more than the pairs (token, feature) with f != 0:

    y_t         = sum_i scale_i f_ti W_dec_i                          a weighted sum of rows a token
    dL/dscale_i = sum_t f_ti (W_dec_i . dL/dy_t)                      one dot product a pair
    dL/dx_t     = sum_i scale_i (W_dec_i . dL/dy_t) W_enc_i           over the pairs too

All sums run in the order of the pairs, so results are the same to the bit whether the pairs have just been found or
were kept from an earlier pass.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from saerl_cli.sae.autoencoder import SAE
from saerl_cli.sae.layout import SPARSE_BELOW, Sparse, rows_of, where

SMALL = 1_000_000
"""Multiplications in a dense decoding below which looking for active features takes longer (measured on a CPU)."""


@dataclass(frozen=True)
class ActiveFeatures:
    """Feature activations at pairs (token, feature), ordered by token."""

    values: Tensor
    """[pairs]; those of a topk SAE may contain zeros."""
    pairs: Sparse
    """Where they are, among [tokens, d_sae]."""


def active_features(sae: SAE, x: Tensor) -> ActiveFeatures | None:
    """The active features of tokens `x`, [tokens, d_in], without gradient; None where sparse sums would not pay."""
    with torch.no_grad():
        if sae.k is not None:
            values, indices = sae.encode_sparse(x)  # [tokens, k]
            return ActiveFeatures(values.reshape(-1), rows_of(indices, sae.d_sae))
        return few(sae.encode(x), sae.d_in)


def few(f: Tensor, d_in: int) -> ActiveFeatures | None:
    """The active ones of [tokens, d_sae]; None where many are, or where there is little to decode."""
    f = f.detach()
    if f.numel() * d_in < SMALL or int(f.count_nonzero()) >= SPARSE_BELOW.get(f.device.type, 1 / 8) * f.numel():
        return None
    pairs = where(f != 0)
    return ActiveFeatures(f.reshape(-1).index_select(0, pairs.places), pairs)


def scaled(sae: SAE, x: Tensor, scale: Tensor, active: ActiveFeatures | None = None) -> Tensor:
    """`(scale * f(x)) W_dec`: [tokens, d_in] -> [tokens, d_in]; differentiable in x and scale.

    Args:
        sae: the frozen SAE.
        x: what it encodes, [tokens, d_in].
        scale: of every feature, [d_sae].
        active: `active_features(sae, x)` where it is known already.
    """
    if active is None and sae.k is not None:
        active = active_features(sae, x)
    if active is None:
        f = sae.encode(x)  # [tokens, d_sae]
        active = few(f, sae.d_in)
        if active is None:
            return (scale * f) @ sae.W_dec
        del f  # frees the dense matrices: from here on only pairs are kept
    result: Any = ScaledDecoding.apply(x, scale, active.values, active.pairs, sae)
    return result


class ScaledDecoding(torch.autograd.Function):
    """`sum_i scale_i f_ti W_dec_i` over pairs, with the gradients given above."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, values: Tensor, pairs: Sparse, sae: SAE) -> Tensor:
        """x: [tokens, d_in] (what `values` were encoded from), scale: [d_sae], values: [pairs] -> [tokens, d_in]."""
        ctx.save_for_backward(scale, values)
        ctx.pairs, ctx.sae = pairs, sae
        return pairs.decode(values * pairs.at(scale), sae.W_dec)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """Gradients with respect to x and scale."""
        (scale, values), pairs, sae = ctx.saved_tensors, ctx.pairs, ctx.sae
        along = pairs.dot(gradients[0], sae.W_dec)  # [pairs]
        dx = dscale = None
        if ctx.needs_input_grad[0]:
            active = along * pairs.at(scale) * (values > 0)
            rows = sae.W_enc.T.contiguous()  # [d_sae, d_in]
            dx = embedding_bag(pairs.feature, rows, pairs.starts, per_sample_weights=active, mode="sum")
        if ctx.needs_input_grad[1]:
            dscale = pairs.sum(along * values)
        return dx, dscale, None, None, None


# --- those of a batch of sequences, as tensors whose rows can be shuffled and split -----------------------------------


def by_sequence(active: ActiveFeatures, batch: int) -> dict[str, Tensor]:
    """Those of `batch` sequences, one row each: values and features [batch, most pairs], counts [batch, seq]."""
    pairs = active.pairs
    counts = torch.bincount(pairs.token, minlength=pairs.tokens).view(batch, -1)
    lengths = counts.sum(1).tolist()
    values, features = (
        torch.nn.utils.rnn.pad_sequence(list(flat.split(lengths)), batch_first=True)
        for flat in (active.values, pairs.feature)
    )
    return {"values": values, "features": features, "counts": counts.int()}


def from_sequences(rows: dict[str, Tensor], d_sae: int) -> ActiveFeatures:
    """Those of some rows of `by_sequence`, in their order."""
    counts = rows["counts"].reshape(-1).long()  # [tokens]
    width = rows["values"].shape[1]
    held = torch.arange(width, device=counts.device) < rows["counts"].sum(1, keepdim=True)  # [batch, most pairs]
    token = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    return ActiveFeatures(rows["values"][held], Sparse(token, rows["features"][held], len(counts), d_sae))
