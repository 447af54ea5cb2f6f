"""Which (token, feature) pairs a step computes with: all of them, or the few that matter.

A loss is written once, on numbers at such pairs, and works in both layouts; the results are equal to rounding. With few
pairs, decoding is a weighted sum of rows (`embedding_bag`), and a gradient with respect to a row is a weighted sum over
the tokens that used it: the same operation on the transposed lists (feature -> tokens). On a CPU this costs a tenth of
the dense products at 32 of 4,096 features; on a GPU the same calls run torch's CUDA kernels.
"""

from functools import cached_property
from typing import Protocol

import numpy
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


class Scratch:
    """Memory for the one large matrix of a step, used again: fresh pages would cost a seventh of the encoder's time.

    SAEs that take turns can share one.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def matrix(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """An uninitialised matrix of the dtype and device of `like`; the last one given is no longer valid."""
        held = self._memory
        if held.numel() < rows * columns or held.dtype != like.dtype or held.device != like.device:
            self._memory = torch.empty(rows * columns, dtype=like.dtype, device=like.device)
        return self._memory[: rows * columns].view(rows, columns)


SPARSE_BELOW = {"cpu": 1 / 8, "cuda": 1 / 64}
"""Share of pairs below which the sparse layout is the faster one (CPU: measured; CUDA: not measured, a guess)."""


class Layout(Protocol):
    """Numbers at pairs are `values`: [pairs] (sparse) or [n, d_sae] (dense). Rows are one a token, [n, width]."""

    def take(self, dense: Tensor) -> Tensor:
        """Values out of a matrix [n, d_sae]."""
        ...

    def at(self, per_feature: Tensor) -> Tensor:
        """A number a feature, [d_sae], at every pair."""
        ...

    def decode(self, values: Tensor, decoder: Tensor) -> Tensor:
        """`sum_i values_i decoder_i` for every token: [n, width]."""
        ...

    def dot(self, rows: Tensor, decoder: Tensor) -> Tensor:
        """`rows_t . decoder_i` at every pair (t, i)."""
        ...

    def by_feature(self, values: Tensor, rows: Tensor) -> Tensor:
        """`sum_t values_ti rows_t` for every feature: [d_sae, width]."""
        ...

    def sum(self, values: Tensor) -> Tensor:
        """Sum over tokens: [d_sae]."""
        ...

    def count(self, condition: Tensor) -> Tensor:
        """Tokens at which a condition on pairs holds, of every feature: [d_sae], integers."""
        ...


class Dense:
    """Every pair; values that do not count are 0."""

    def take(self, dense: Tensor) -> Tensor:
        """The matrix itself."""
        return full_precision(dense)

    def at(self, per_feature: Tensor) -> Tensor:
        """Broadcast over tokens."""
        return per_feature

    def decode(self, values: Tensor, decoder: Tensor) -> Tensor:
        """[n, d_sae] @ [d_sae, width]."""
        return values @ decoder

    def dot(self, rows: Tensor, decoder: Tensor) -> Tensor:
        """[n, width] @ [width, d_sae]."""
        return rows @ decoder.T

    def by_feature(self, values: Tensor, rows: Tensor) -> Tensor:
        """[d_sae, n] @ [n, width]."""
        return values.T @ rows

    def sum(self, values: Tensor) -> Tensor:
        """Over tokens."""
        return values.sum(0)

    def count(self, condition: Tensor) -> Tensor:
        """Over tokens."""
        return condition.sum(0)


class Sparse:
    """Some pairs, ordered by token.

    Args:
        token: of each pair, [pairs], not falling.
        feature: of each pair, [pairs].
        tokens: number of tokens.
        d_sae: number of features.

    Attributes:
        starts: the first pair of each token, [tokens].
    """

    def __init__(self, token: Tensor, feature: Tensor, tokens: int, d_sae: int):
        self.token, self.feature = token.int(), feature.int()  # half the memory traffic of int64
        self.tokens, self.d_sae = tokens, d_sae
        every = torch.arange(tokens, device=token.device, dtype=torch.int32)
        self.starts = torch.searchsorted(self.token, every, out_int32=True)

    @cached_property
    def places(self) -> Tensor:
        """Of the pairs in a matrix [tokens, d_sae] laid out flat, [pairs]."""
        return self.token.long() * self.d_sae + self.feature

    @cached_property
    def _transposed(self) -> tuple[Tensor, Tensor]:
        """Pairs ordered by feature, and where each feature's begin; stable, hence one order of summation."""
        count = torch.bincount(self.feature, minlength=self.d_sae)
        return self.feature.argsort(stable=True), (count.cumsum(0) - count).int()

    def take(self, dense: Tensor) -> Tensor:
        """One number a pair."""
        return full_precision(dense.reshape(-1).index_select(0, self.places))

    def at(self, per_feature: Tensor) -> Tensor:
        """One number a pair."""
        return per_feature.index_select(0, self.feature)

    def decode(self, values: Tensor, decoder: Tensor) -> Tensor:
        """A weighted sum of rows a token."""
        return embedding_bag(self.feature, decoder, self.starts, per_sample_weights=values, mode="sum")

    def dot(self, rows: Tensor, decoder: Tensor) -> Tensor:
        """The backward pass of `decode` with respect to its values."""
        backward = torch.ops.aten._embedding_bag_per_sample_weights_backward
        return backward(rows.contiguous(), decoder, self.feature, self.starts, self.token, 0)

    def by_feature(self, values: Tensor, rows: Tensor) -> Tensor:
        """A weighted sum of tokens' rows a feature."""
        order, begins = self._transposed
        weights = values.index_select(0, order)
        return embedding_bag(self.token.index_select(0, order), rows, begins, per_sample_weights=weights, mode="sum")

    def sum(self, values: Tensor) -> Tensor:
        """Over the pairs of each feature."""
        return torch.bincount(self.feature, weights=values, minlength=self.d_sae).to(values.dtype)

    def count(self, condition: Tensor) -> Tensor:
        """Occurrences of a feature among the pairs at which the condition holds."""
        return torch.bincount(self.feature[condition], minlength=self.d_sae)


def full_precision(values: Tensor) -> Tensor:
    """What a bfloat16 product gave, in float32; other precisions as they are."""
    return values.float() if values.dtype is torch.bfloat16 else values


def rows_of(indices: Tensor, d_sae: int) -> Sparse:
    """The layout of k features a token, indices [n, k]."""
    n, k = indices.shape
    token = torch.arange(n, device=indices.device).repeat_interleave(k)
    return Sparse(token, indices.reshape(-1), n, d_sae)


def where(mask: Tensor) -> Sparse:
    """The layout of the pairs at which a mask [n, d_sae] holds."""
    n, d_sae = mask.shape
    if mask.device.type == "cpu":  # numpy finds them in half the time
        flat = torch.from_numpy(numpy.flatnonzero(mask.numpy()))
    else:
        flat = mask.view(-1).nonzero()[:, 0]
    return Sparse(flat // d_sae, flat % d_sae, n, d_sae)


def fitting(mask: Tensor, kernel: str) -> Layout:
    """The layout for the pairs of a mask: the faster one, or the one that is asked for (`sparse`, `dense`)."""
    if kernel == "auto":
        few = int(mask.count_nonzero()) < SPARSE_BELOW.get(mask.device.type, 1 / 8) * mask.numel()
        kernel = "sparse" if few else "dense"
    return where(mask) if kernel == "sparse" else Dense()
