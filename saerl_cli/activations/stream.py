"""Shuffled batches of activations, from a buffer that is filled, permuted once and served in slices.

The order of everything is a pure function of (seed, step). A stream stands at a plain `state()`, and one that is made
with it goes on with the batch, to the bit, that an uninterrupted one would serve.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from saerl_cli.activations.forward import FORWARD_TOKENS, capture, rows_at_once
from saerl_cli.activations.tokens import Cursor, MemoryRows, StreamedRows, seeded, text_mask
from saerl_cli.data.documents import Counts
from saerl_cli.models import Site
from saerl_cli.run import shards

Chunk = tuple[Tensor, dict[str, Tensor]]
"""Activations by site name, [m, width], and which of their rows are the next tokens, [n]."""


@dataclass
class Fill:
    """One buffer: this process's activations in the order of serving."""

    index: int
    """Number of the buffer."""
    start: Cursor
    """Where its rows begin."""
    end: Cursor
    """Where those of the next begin."""
    places: Tensor
    """Place in the buffer of all processes of each token, [n] ascending."""
    data: dict[str, Tensor]
    """Site name -> [n, width]."""
    kept: Tensor
    """False where a token is an outlier, [n]."""


class ShuffledStream(ABC):
    """An endless iterator of shuffled activation batches, `dict` of site name -> [n, width].

    A buffer holds `buffer_tokens // batch_size` batches. Its memory is allocated once; every token is written to its
    shuffled place as it arrives, and batches are copies of slices. With several processes each holds its share of the
    buffer and serves its share of every batch, so that the shares of all are the batch that one process would serve.

    Args:
        sites: where activations are taken.
        device: where they lie.
        dtype: theirs, for a process that gets none.
        batch_size: tokens a batch, over all processes.
        buffer_tokens: tokens shuffled together.
        seed: of the order.
        rank: this process.
        world_size: processes.
        outlier_norm: tokens whose activation at any site is longer than so many times that site's median are left out
            of their batch, which then holds fewer rows. The median is that of the first forward pass over the text.
        prefetch: compute the next buffer in a thread while one is served.
        state: where to go on, of `state()`.

    Attributes:
        positions: place in the whole batch of each row served last, [n].
        dropped: outliers that this process has left out since this object was made.
        counts: what reading the text has met.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int,
        buffer_tokens: int,
        seed: int,
        rank: int,
        world_size: int,
        outlier_norm: float | None,
        prefetch: bool,
        state: dict[str, Any],
    ):
        self.sites, self.device, self.dtype = list(sites), device, dtype
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.outlier_norm = outlier_norm
        self.batches_per_fill = max(1, buffer_tokens // batch_size)
        self.capacity = self.batches_per_fill * batch_size
        self.positions: Tensor | None = None
        self.dropped = 0
        self.counts = Counts()
        self._index, self._step, self._cursor = state["fill"], state["step"], state["cursor"]  # of the next fill
        self._current: Fill | None = None
        self._memory: list[dict[str, Tensor]] = [{}, {}] if prefetch else [{}]
        self._executor = ThreadPoolExecutor(1, "activations") if prefetch else None
        self._future: Future[Fill] | None = None
        self._closed = False

    @abstractmethod
    def _plan(self, index: int, cursor: Cursor) -> tuple[Tensor, Iterable[Chunk], Cursor]:
        """What fill number `index` holds.

        Returns:
            Place of each of this process's tokens in the order in which they arrive, [n], those from `capacity` on to
            be left out; the tokens; the cursor behind them.
        """

    @abstractmethod
    def _first_tokens(self) -> dict[str, Tensor]:
        """Activations of the first forward pass over the text, in every process: site name -> [n, width]."""

    # --- serving -----------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        if self._current is None:
            self._current = self._advance()
        elif self._step == self.batches_per_fill:
            self._current, self._step = self._advance(), 0
        fill, first = self._current, self._step * self.batch_size
        low, high = torch.searchsorted(fill.places, torch.tensor([first, first + self.batch_size])).tolist()
        self._step += 1
        positions, kept = fill.places[low:high] - first, fill.kept[low:high]
        # Copies, because the next fill writes into the same memory; a caller may keep its batches.
        batch = {name: x[low:high].clone() for name, x in fill.data.items()}
        outliers = len(kept) - int(kept.sum()) if self.outlier_norm else 0
        if outliers:
            self.dropped += outliers
            positions = positions[kept]
            batch = {name: x[kept.to(x.device)] for name, x in batch.items()}
        self.positions = positions
        return batch

    def state(self) -> dict[str, Any]:
        """Where the next batch is, as plain data; the same in every process."""
        fill = self._current
        if fill is None or self._step == self.batches_per_fill:
            return {"fill": self._index, "step": self._step if fill is None else 0, "cursor": self._cursor}
        return {"fill": fill.index, "step": self._step, "cursor": fill.start}

    def close(self) -> None:
        """End the thread of `prefetch`; the stream serves nothing more."""
        self._closed = True
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def _advance(self) -> Fill:
        if self._closed:
            raise ValueError("the stream is closed")
        if self._executor is None:
            fill = self._load(self._index, self._cursor)
        else:
            fill = (self._future or self._later(self._index, self._cursor)).result()
            self._future = self._later(fill.index + 1, fill.end)
        self._index, self._cursor = fill.index + 1, fill.end
        return fill

    def _later(self, index: int, cursor: Cursor) -> "Future[Fill]":
        assert self._executor is not None
        return self._executor.submit(self._load_in_thread, torch.get_num_threads(), index, cursor)

    def _load_in_thread(self, threads: int, index: int, cursor: Cursor) -> Fill:
        torch.set_num_threads(threads)  # a property of a thread: another number would add up in another order
        return self._load(index, cursor)

    # --- filling -----------------------------------------------------------------------------------------------------

    def _load(self, index: int, start: Cursor) -> Fill:
        """Fill number `index`, in the memory that the one served now does not use."""
        place, chunks, end = self._plan(index, start)
        slot, places = serving_order(place, self.capacity)
        memory = self._memory[index % len(self._memory)]
        data = {site.name: torch.empty(0, site.width, dtype=self.dtype, device=self.device) for site in self.sites}
        kept = torch.ones(len(places), dtype=torch.bool)
        sums = {name: torch.zeros((), dtype=torch.float64, device=self.device) for name in data}
        arrived = 0
        for rows, activations in chunks:
            if self._closed:
                raise ValueError("the stream is closed")
            to = slot[arrived : arrived + len(rows)]
            arrived += len(rows)
            served = to >= 0
            to, rows = to[served], rows[served].to(self.device)
            for name, x in activations.items():
                x = x.index_select(0, rows)
                data[name] = reused(memory, name, len(places), x)
                data[name].index_copy_(0, to.to(self.device), x)
                sums[name] += x.sum(dtype=torch.float64)  # finite numbers cannot overflow it
                if self.outlier_norm:
                    kept[to] &= (norms(x) <= self._limits[name]).cpu()
        shards.barrier()
        for name, total in sums.items():
            if not total.isfinite():
                raise ValueError(self._not_finite(name, index, places, data[name]))
        return Fill(index, start, end, places, data, kept)

    @cached_property
    def _limits(self) -> dict[str, float]:
        """Site name -> norm above which an activation is an outlier."""
        factor = self.outlier_norm or float("inf")
        return {name: factor * float(norms(x).median()) for name, x in self._first_tokens().items()}

    def _not_finite(self, name: str, index: int, places: Tensor, x: Tensor) -> str:
        """What is wrong with the activations of a fill, and the first step that would be trained on them."""
        bad = places[~x.isfinite().all(-1).cpu()]
        step = index * self.batches_per_fill + int(bad.min()) // self.batch_size + 1
        return f"step {step}: activations at {name} are NaN or infinite"


def serving_order(place: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """How a process's tokens are ordered by their places in the buffer of all processes.

    Args:
        place: of each token in the order of arrival, [n], each once.
        capacity: places served.

    Returns:
        Row of each token in this process's buffer, -1 where its place is not served, [n]; the places served, [m]
        ascending.
    """
    taken = torch.zeros(capacity, dtype=torch.bool)
    served = place < capacity
    taken[place[served]] = True
    slot = torch.full_like(place, -1)
    slot[served] = (taken.cumsum(0) - 1)[place[served]]
    return slot, taken.nonzero()[:, 0]


def reused(memory: dict[str, Tensor], name: str, rows: int, like: Tensor) -> Tensor:
    """A site's first `rows` rows of memory; allocated where there are not so many."""
    if name not in memory or len(memory[name]) < rows:
        # Shares of a buffer vary by a few rows; the old tensor is let go before there is a new one.
        spare = rows // 16 if memory.pop(name, None) is not None else 0
        memory[name] = like.new_empty(rows + spare, like.shape[-1])
    return memory[name][:rows]


def norms(x: Tensor) -> Tensor:
    """Euclidean length of each row, in float32."""
    return x.float().norm(dim=-1)


class ActivationStream(ShuffledStream):
    """A `ShuffledStream` that computes activations as they are needed.

    A buffer is filled from as many rows as hold its tokens of text; what remains of the last row is dropped. Of several
    processes each computes every `world_size`-th row.

    Args:
        model: a language model.
        rows: token ids [rows, context_size], whose order is reshuffled every epoch, or rows read as they are needed.
        sites: where to read.
        special: token ids to leave out.
        batch_size: tokens a batch, over all processes.
        buffer_tokens: tokens shuffled together.
        seed: of the order.
        start_step: batches to skip, without computing them, where there is no `state`.
        rank: this process.
        world_size: processes.
        outlier_norm: as in `ShuffledStream`, and so are the following.
        prefetch: compute ahead in a thread.
        state: where to go on.

    Raises:
        ValueError: the rows hold less text than one batch; on serving, activations that are NaN or infinite.
    """

    def __init__(
        self,
        model: Any,
        rows: Tensor | StreamedRows,
        sites: Sequence[Site],
        special: Sequence[int],
        batch_size: int,
        buffer_tokens: int = 65_536,
        seed: int = 0,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        outlier_norm: float | None = None,
        prefetch: bool = False,
        state: dict[str, Any] | None = None,
    ):
        self.model, self.special = model, list(special)
        self.rows = MemoryRows(rows, special, seed) if isinstance(rows, Tensor) else rows
        refuse_short(int(text_mask(self.rows.head(batch_size), special).sum()), batch_size)
        weight = model.get_input_embeddings().weight
        super().__init__(
            sites,
            weight.device,
            weight.dtype,
            batch_size,
            buffer_tokens,
            seed,
            rank,
            world_size,
            outlier_norm,
            prefetch,
            state or {"fill": 0, "step": 0, "cursor": self.rows.start},
        )
        self.counts = getattr(self.rows, "counts", self.counts)
        if state is None:
            self._index, self._step = divmod(start_step, self.batches_per_fill)
            for _ in range(self._index):
                _, self._cursor = self.rows.take(self._cursor, self.capacity)

    def _plan(self, index: int, cursor: Cursor) -> tuple[Tensor, Iterable[Chunk], Cursor]:
        rows, end = self.rows.take(cursor, self.capacity)
        lengths = text_mask(rows, self.special).sum(1)
        place = torch.randperm(int(lengths.sum()), generator=seeded(self.seed, 1, index))  # place of each token
        mine = slice(self.rank, None, self.world_size)
        own = torch.cat([place[:0], *place.split(lengths.tolist())[mine]])
        return own, self._forward(rows[mine]), end

    def _first_tokens(self) -> dict[str, Tensor]:
        first = self.rows.head(FORWARD_TOKENS)[: rows_at_once(self.rows.context_size)]
        chunks = list(self._forward(first))
        return {name: x[rows.to(x.device)] for rows, found in chunks for name, x in found.items()}

    def _forward(self, rows: Tensor) -> Iterator[Chunk]:
        """Activations of rows of tokens, a forward pass at a time."""
        for some in rows.split(rows_at_once(self.rows.context_size)) if len(rows) else ():
            captured = capture(self.model, self.sites, some.to(self.device))
            text = text_mask(some, self.special).flatten().nonzero()[:, 0]
            yield text, {name: x.flatten(0, 1) for name, x in captured.items()}


def refuse_short(available: int, batch_size: int) -> None:
    """`ValueError` when text does not hold one batch."""
    if available < batch_size:
        raise ValueError(
            f"the text holds {available} tokens, less than one batch of sae.batch_size={batch_size};"
            " lower it or give more text"
        )
