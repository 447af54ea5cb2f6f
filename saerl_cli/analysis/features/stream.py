"""Activations of features on text, read as a stream: only sums, counts and a few places of each feature are kept.

Two passes over the text: `take_census` for every feature of an SAE, whatever their number, then `collect` for the few
that are looked at. What they find does not depend on how the text is cut into batches, but for rounding.

Letters: `n` tokens, `M` features of the SAE, `C` of them looked at, `K` places of each, `W` tokens around a place.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, pad

from saerl_cli.activations import FORWARD_TOKENS, capture
from saerl_cli.models import Site
from saerl_cli.sae.autoencoder import SAE

CODES_AT_ONCE = 2**23
"""Numbers in a batch of activations of all features, [tokens, M]: 32 MB in float32."""
PRODUCTS_AT_ONCE = 2**22
"""Numbers in a matrix of products of chosen with all features, [C, M]."""
MOST_AT_ONCE = 128
"""Features collected together, at most."""
BEFORE, AFTER = 12, 6
"""Tokens of a context before and after the place that it is shown for."""
BINS = 40
"""Of a histogram of activations."""
SPARE = 4
"""So many times the places asked for are kept, because contexts that read alike are shown once."""


@dataclass(frozen=True)
class Text:
    """What is read."""

    rows: Tensor
    """Token ids, [rows, seq]."""
    mask: Tensor
    """Which of them count, bool [rows, seq]; features are silent on the others."""
    lengths: Tensor | None = None
    """Tokens of each row before it was filled up, [rows]; None: rows are full."""

    @property
    def tokens(self) -> int:
        """Tokens that count."""
        return int(self.mask.sum())

    def row(self, index: int) -> Tensor:
        """A row without what it was filled up with."""
        return self.rows[index] if self.lengths is None else self.rows[index, : int(self.lengths[index])]


@dataclass(frozen=True)
class Source:
    """Where features are read: a model, a place in it, the SAE of that place."""

    model: Any
    site: Site
    sae: SAE
    rows_at_once: int | None = None
    """Rows a forward pass; by the number of their tokens when None."""

    def activations(self, text: Text) -> Iterator[tuple[int, Tensor, Tensor]]:
        """First row, activations [rows, seq, d_in] and the mask of each batch of rows."""
        at_once = self.rows_at_once or max(1, FORWARD_TOKENS // text.rows.shape[1])
        for first in range(0, len(text.rows), at_once):
            part = slice(first, first + at_once)
            ids, mask = (tensor[part].to(self.sae.W_dec.device) for tensor in (text.rows, text.mask))
            yield first, capture(self.model, [self.site], ids)[self.site.name].float(), mask

    def codes(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Activations of all features [part, M] for x [n, d_in], a part of the tokens at a time."""
        at_once = max(1, CODES_AT_ONCE // self.sae.d_sae)
        for first in range(0, len(x), at_once):
            part = slice(first, first + at_once)
            with torch.no_grad():
                yield part, self.sae.encode(x[part])


# --- first pass: all features ----------------------------------------------------------------------------------------


@dataclass
class Census:
    """Sums over tokens for every feature, float64 [M]."""

    tokens: int
    fired: Tensor
    """Tokens on which it fires."""
    total: Tensor
    """Sum of its activation."""
    square: Tensor
    """Sum of its squared activation."""
    peak: Tensor
    """Its largest activation, float32."""

    @property
    def density(self) -> Tensor:
        """Share of tokens on which it fires."""
        return self.fired / max(self.tokens, 1)

    @property
    def mean(self) -> Tensor:
        """Mean activation over all tokens."""
        return self.total / max(self.tokens, 1)


def take_census(source: Source, text: Text) -> Census:
    """How often and how strongly every feature of an SAE fires."""
    like = source.sae.W_dec
    fired, total, square = torch.zeros(3, source.sae.d_sae, dtype=torch.float64, device=like.device)
    peak = like.new_zeros(source.sae.d_sae)
    tokens = 0
    for _, x, mask in source.activations(text):
        x = x[mask]  # [n, d_in]
        tokens += len(x)
        for _, f in source.codes(x):
            fired += (f > 0).sum(0)
            total += f.sum(0)
            square += f.square().sum(0)
            torch.maximum(peak, f.amax(0), out=peak)
    return Census(tokens, fired, total, square, peak)


# --- places ----------------------------------------------------------------------------------------------------------


@dataclass
class Places:
    """The places with the largest scores, a column a feature, best first; of equal scores the earlier place."""

    score: Tensor
    """[K, C]; 0 or less: there is no such place."""
    row: Tensor
    """[K, C]."""
    at: Tensor
    """Position in the row, [K, C]."""
    window: Tensor
    """Activations around the place, [K, C, W]; 0 beyond the ends of the row."""

    @classmethod
    def none(cls, columns: int, device: Any) -> "Places":
        """No places yet."""
        index = torch.zeros(0, columns, dtype=torch.long, device=device)
        return cls(index.float(), index, index, torch.zeros(0, columns, BEFORE + 1 + AFTER, device=device))

    @property
    def value(self) -> Tensor:
        """The activation at the place, [K, C]."""
        return self.window[..., BEFORE]

    def add(self, k: int, score: Tensor, at: Tensor, row: Tensor, first: int, padded: Tensor) -> None:
        """Keep the best `k` of these and of new places.

        Args:
            k: how many.
            score: of the new places, [n, C], in the order of the text.
            at: positions, [n, C].
            row: rows of this batch, [n, C].
            first: the batch's first row.
            padded: activations with BEFORE and AFTER zeros around each row, [rows, BEFORE + seq + AFTER, C].
        """
        order = score.sort(dim=0, descending=True, stable=True)
        score, chosen = order.values[:k], order.indices[:k]  # [<= k, C]
        at, row = at.gather(0, chosen), row.gather(0, chosen)
        window = windows(padded, row, at)
        everything = [(self.score, score), (self.row, row + first), (self.at, at)]
        score, row, at = (torch.cat(pair) for pair in everything)
        window = torch.cat([self.window, window])
        best = score.sort(dim=0, descending=True, stable=True).indices[:k]
        self.score, self.row, self.at = (tensor.gather(0, best) for tensor in (score, row, at))
        self.window = window.gather(0, best[..., None].expand(-1, -1, window.shape[-1]))


def padded_rows(f: Tensor) -> Tensor:
    """Activations [rows, seq, C] with room for windows at both ends of a row."""
    return pad(f, (0, 0, BEFORE, AFTER))


def windows(padded: Tensor, row: Tensor, at: Tensor) -> Tensor:
    """Activations around places: padded [rows, ..., C], row and at [K, C] -> [K, C, W]."""
    offsets = torch.arange(BEFORE + 1 + AFTER, device=at.device)
    columns = torch.arange(padded.shape[-1], device=at.device)[None, :, None]
    return padded[row[..., None], at[..., None] + offsets, columns]


# --- second pass: some features --------------------------------------------------------------------------------------


@dataclass
class Collected:
    """What was kept of some features, [C] or [..., C]."""

    chosen: Tensor
    """The features, [C]."""
    top: Places
    """Where they fire most, one place a row."""
    sample: Places
    """A random sample of the places where they fire."""
    silent: Places
    """Random places with nothing of them around, one a row."""
    histogram: Tensor
    """How many activations above 0 lie in each of BINS equal bins up to the largest, [C, BINS]."""
    by_token: Tensor
    """Summed activation on every token id, [V, C]."""
    features: Tensor
    """Sum of their activation times that of every feature, [C, M]."""
    inputs: Tensor
    """Sum of their activation times that of every dimension of what the SAE reads, [C, d_in]."""
    dimensions: Tensor
    """Sum and sum of squares of those dimensions, [2, d_in]."""
    values: list[Tensor] = field(default_factory=list)
    """Activations on every token that counts, [n, C] in parts; empty unless they were asked for."""


@dataclass(frozen=True)
class Keep:
    """What is kept of every feature."""

    top: int = 10
    """Places of the largest activation."""
    sample: int = 200
    """Places drawn from all where a feature fires."""
    silent: int = 0
    """Places drawn where it does not."""
    seed: int = 0
    """Of the draw."""
    values: bool = False
    """Whether to keep every activation, [n, C]."""
    products: bool = True
    """Whether to sum products with all features and dimensions; their sums are empty otherwise."""


def collect(source: Source, text: Text, chosen: Tensor, peak: Tensor, keep: Keep) -> Collected:
    """Read the text once more, for a few features.

    The random sample is that of the places with the largest random numbers, one drawn for every token: uniform over
    all firings, and the same however the text is cut into batches.

    Args:
        source: model, site and SAE.
        text: what is read.
        chosen: features, [C].
        peak: largest activation of each, from the census, [C].
        keep: how much of each.
    """
    sae, device = source.sae, source.sae.W_dec.device
    columns, chosen, peak = len(chosen), chosen.to(device), peak.to(device)
    vocabulary = int(text.rows.max()) + 1
    luck = torch.rand(text.rows.shape, generator=torch.Generator().manual_seed(keep.seed)).clamp_min(1e-6).to(device)

    def sums(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=device)

    found = Collected(
        chosen,
        Places.none(columns, device),
        Places.none(columns, device),
        Places.none(columns, device),
        sums(columns, BINS),
        sums(vocabulary, columns),
        sums(columns, sae.d_sae * keep.products),
        sums(columns, sae.d_in * keep.products),
        sums(2, sae.d_in * keep.products),
    )
    for first, x, mask in source.activations(text):
        x = x[mask]  # [n, d_in]
        f = x.new_zeros(len(x), columns)  # [n, C]
        for part, every in source.codes(x):
            f[part] = every[:, chosen]
            if keep.products:
                found.features += f[part].T @ every
        if keep.products:
            found.inputs += f.T @ x
            found.dimensions += torch.stack([x.sum(0), x.square().sum(0)])
        found.by_token.index_add_(0, text.rows[first : first + len(mask)].to(device)[mask], f.double())
        found.histogram += binned(f, peak)
        if keep.values:
            found.values.append(f.cpu())
        dense = f.new_zeros(*mask.shape, columns)
        dense[mask] = f  # [rows, seq, C]
        add_places(found, dense, mask, luck[first : first + len(mask)], first, keep)
    return found


def add_places(found: Collected, f: Tensor, mask: Tensor, luck: Tensor, first: int, keep: Keep) -> None:
    """The best places of a batch: f [rows, seq, C], mask and luck [rows, seq]."""
    rows, seq, columns = f.shape
    padded = padded_rows(f)
    every = torch.arange(rows, device=f.device)[:, None].expand(rows, columns)
    if keep.top:
        score, at = f.max(dim=1)  # [rows, C]
        found.top.add(keep.top, score, at, every, first, padded)
    if keep.sample:
        score = torch.where(f > 0, luck[..., None], 0.0).view(-1, columns)  # [rows * seq, C]
        place = torch.arange(rows * seq, device=f.device)[:, None].expand(-1, columns)
        found.sample.add(keep.sample, score, place % seq, place // seq, first, padded)
    if keep.silent:
        around = max_pool1d(padded.permute(0, 2, 1), BEFORE + 1 + AFTER, stride=1).permute(0, 2, 1)  # [rows, seq, C]
        score, at = torch.where((around <= 0) & mask[..., None], luck[..., None], 0.0).max(dim=1)
        found.silent.add(keep.silent, score, at, every, first, padded)


def binned(f: Tensor, peak: Tensor) -> Tensor:
    """Histogram of the activations above 0: f [n, C], peak [C] -> counts [C, BINS], float64."""
    place = (f / peak.clamp_min(1e-30) * BINS).long().clamp_max(BINS - 1)  # [n, C]
    counts = torch.zeros(f.shape[1], BINS, dtype=torch.float64, device=f.device)
    return counts.scatter_add_(1, place.T, (f > 0).T.double())


def pearson(found: Collected, census: Census) -> Tensor:
    """Correlation of the activations of the chosen features with those of all, [C, M]; 0 where one never varies."""
    n = max(census.tokens, 1)
    covariance = found.features / n - census.mean[found.chosen][:, None] * census.mean
    spread = (census.square / n - census.mean.square()).clamp_min(0).sqrt()
    scale = spread[found.chosen][:, None] * spread
    return torch.where(scale > 1e-20, covariance / scale.clamp_min(1e-20), 0.0).clamp(-1, 1)


def windows_at(source: Source, text: Text, places: Places, chosen: Tensor) -> Tensor:
    """Activations of features around places found before, in another model: [K, C, W]."""
    found = torch.zeros_like(places.window)
    for first, x, mask in source.activations(text):
        here = (places.row >= first) & (places.row < first + len(mask)) & (places.score > 0)
        if not here.any():
            continue
        dense = x.new_zeros(*mask.shape, len(chosen))  # [rows, seq, C]
        kept = x.new_zeros(int(mask.sum()), len(chosen))
        for part, every in source.codes(x[mask]):
            kept[part] = every[:, chosen]
        dense[mask] = kept
        row = (places.row - first).clamp(0, len(mask) - 1)
        found = torch.where(here[..., None], windows(padded_rows(dense), row, places.at), found)
    return found
