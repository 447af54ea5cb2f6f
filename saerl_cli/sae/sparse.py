"""The TopK step without its dense matrices: the gradient of the squared error, from k numbers a token.

Of d_sae features k fire. Decoding is a weighted sum of k rows (`embedding_bag`); a gradient with respect to a row is a
weighted sum over the tokens that used it, which is the same operation on the transposed lists (feature -> tokens). On a
CPU this costs a tenth of the dense products and gives the same numbers up to the order of summation.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


class Gradients(NamedTuple):
    """Gradients of the loss with respect to the training parameters, in their shapes."""

    encoder: Tensor
    b_enc: Tensor
    decoder: Tensor
    b_dec: Tensor


def select(x: Tensor, encoder: Tensor, b_enc: Tensor, decoder: Tensor, b_dec: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k features of each token with the largest `z_i |decoder_i|`, and their activations `relu(z_i)`.

    Weighting by the decoder norm makes the choice that of the folded, unit-norm SAE that is saved, so norms are free.

    Args:
        x: inputs [n, d_in].
        encoder: a feature a row, [d_sae, d_in].
        b_enc: [d_sae].
        decoder: a feature a row, [d_sae, d_in].
        b_dec: [d_in].
        k: features a token.

    Returns:
        values [n, k], at least 0, and feature indices [n, k].
    """
    norm = decoder.norm(dim=-1)
    folded = encoder * norm[:, None]
    scores = torch.addmm(b_enc * norm - folded @ b_dec, x, folded.T)  # [n, d_sae]
    values, indices = scores.topk(k, dim=-1, sorted=False)
    return values.relu_() / norm[indices].clamp_min(1e-12), indices


def reconstruct(values: Tensor, indices: Tensor, decoder: Tensor, b_dec: Tensor) -> Tensor:
    """`sum_i values_i decoder[indices_i] + b_dec`: [n, k], [n, k] -> [n, d_in]."""
    return embedding_bag(indices, decoder, per_sample_weights=values, mode="sum") + b_dec


def gradients(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    error: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    b_dec: Tensor,
    total: int,
) -> Gradients:
    """Gradients of `sum over tokens and dimensions of error^2, / total`.

    Args:
        x: inputs [n, d_in].
        values: activations [n, k], from `select`.
        indices: the features they belong to, [n, k].
        error: reconstruction minus x, [n, d_in].
        encoder: [d_sae, d_in].
        decoder: [d_sae, d_in].
        b_dec: [d_in].
        total: tokens the loss is averaged over: n, or the batch of all processes together.
    """
    n, k = indices.shape
    d_sae = len(decoder)
    g = error * (2.0 / total)
    flat = indices.reshape(-1)
    token = torch.arange(n, device=x.device).repeat_interleave(k)
    starts = torch.arange(0, n * k, k, device=x.device)
    # d(loss)/d(values) = g . decoder[i]: the backward pass of embedding_bag with respect to its weights.
    d_values = torch.ops.aten._embedding_bag_per_sample_weights_backward(g, decoder, flat, starts, token, 0)
    d_values = d_values * (values.reshape(-1) > 0)
    # Transposed lists: the tokens of feature 0, then those of feature 1, …; stable, hence one order of summation.
    order = flat.argsort(stable=True)
    used_by = token[order]
    count = torch.bincount(flat, minlength=d_sae)
    offsets = count.cumsum(0) - count
    d_decoder = embedding_bag(used_by, g, offsets, per_sample_weights=values.reshape(-1)[order], mode="sum")
    d_encoder = embedding_bag(used_by, x - b_dec, offsets, per_sample_weights=d_values[order], mode="sum")
    d_b_enc = embedding_bag(used_by, torch.ones_like(g[:, :1]), offsets, per_sample_weights=d_values[order], mode="sum")
    d_b_enc = d_b_enc[:, 0]
    d_b_dec = g.sum(0) - d_b_enc @ encoder  # summed over tokens before the one matrix-vector product
    return Gradients(d_encoder, d_b_enc, d_decoder, d_b_dec)
