"""Activations on disk: one flat file a site, written once, read by every run on the same model, text and sites.

A cache folder holds a folder for each key, complete or absent:

    CACHE/KEY/meta.json      identity, tokens, and of each site its file, width, mean and mean norm
    CACHE/KEY/MODULE.bin     [tokens, width] in row-major order, float32 or bfloat16, text tokens only
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saerl_cli.activations.forward import capture, rows_at_once
from saerl_cli.activations.stream import Chunk, ShuffledStream, norms, refuse_short
from saerl_cli.activations.tokens import Cursor, seeded, text_mask
from saerl_cli.config.activations import ActivationsConfig
from saerl_cli.models import Loaded, Site
from saerl_cli.run import shards
from saerl_cli.run.files import flush, read_json, write_json
from saerl_cli.run.progress import progress, say

BLOCK_TOKENS = 1024
"""Tokens read together; each epoch permutes the blocks, and each buffer its tokens."""
FORMAT = 1


def cached_activations(
    loaded: Loaded,
    rows: Tensor,
    sites: Sequence[Site],
    special: Sequence[int],
    config: ActivationsConfig,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
) -> Path:
    """The folder with the activations of these rows, written now where it is missing or damaged.

    Several processes write together; another run that wants the same folder waits for it.

    Args:
        loaded: the model; not run when the folder is there.
        rows: token ids, [rows, context_size].
        sites: where to read.
        special: token ids to leave out.
        config: folder, precision and limit.
        rank: this process.
        world_size: processes, which share the folder's file system.
        barrier: returns when every process has called it.

    Raises:
        ValueError: the cache would exceed `activations.cache_gb` or the free space, or activations are not finite.
    """
    identity = identify(loaded, rows, sites, special, config)
    parent = Path(config.cache or "").expanduser()
    folder = parent / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    partial = parent / f".{folder.name}.partial"
    writer = Writer(loaded, rows, sites, special, getattr(torch, config.cache_dtype.value), partial)
    with one_writer(folder) if rank == 0 else contextlib.nullcontext():
        if rank == 0 and not intact(folder, identity, writer.sizes()):
            refuse_too_large(sum(writer.sizes().values()), config, parent)
            writer.prepare()
        barrier()
        if partial.is_dir():
            with removed_on_error(partial):
                writer.write(rank, world_size)
                barrier()
                if rank == 0:
                    writer.finish(identity, world_size)
                    os.replace(partial, folder)
                    size = sum(writer.sizes().values()) / 1e9
                    say(f"wrote {writer.tokens} activations a site ({size:.3g} GB) to {folder}")
        elif rank == 0:
            say(f"reading activations from {folder}")
        barrier()
    return folder


@contextlib.contextmanager
def removed_on_error(folder: Path) -> Iterator[None]:
    """Do not leave gigabytes behind that nothing will read."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def identify(
    loaded: Loaded, rows: Tensor, sites: Sequence[Site], special: Sequence[int], config: ActivationsConfig
) -> dict[str, Any]:
    """All that activations on disk depend on; the folder is named by its hash."""
    return {
        "format": FORMAT,
        "model_sha256": loaded.sha256,
        "model_dtype": str(loaded.model.dtype).removeprefix("torch."),
        "modules": sorted(site.module for site in sites),
        "rows_sha256": hashlib.sha256(rows.flatten().numpy().data).hexdigest(),
        "rows": len(rows),
        "context_size": rows.shape[1],
        "special": sorted(special),
        "dtype": config.cache_dtype.value,
    }


def intact(folder: Path, identity: dict[str, Any], sizes: dict[str, int]) -> bool:
    """Whether a folder holds what its key says; a damaged one is removed, with a message.

    Args:
        folder: where activations would be.
        identity: of `identify`.
        sizes: file name -> bytes.
    """
    if not folder.exists():
        return False
    try:
        meta = read_json(folder / "meta.json")
        found = {name: (folder / name).stat().st_size for name in sizes}
        wrong = [name for name, size in sizes.items() if found[name] != size]
        damage = f"{wrong[0]} has {found[wrong[0]]} bytes of {sizes[wrong[0]]}" if wrong else ""
        damage = damage or ("" if meta["identity"] == identity else "meta.json belongs to other activations")
    except (OSError, ValueError, KeyError, TypeError) as error:
        damage = str(error)
    if damage:
        say(f"the cached activations in {folder} are damaged ({damage}); computing them again")
        shutil.rmtree(folder)
    return not damage


def refuse_too_large(needed: int, config: ActivationsConfig, parent: Path) -> None:
    """`ValueError` when so many bytes exceed the limit or the disk."""
    instead = "; lower data.max_documents, name fewer sites"
    if config.cache_dtype.value != "bfloat16":
        instead += ", write activations.cache_dtype=bfloat16"
    if needed > config.cache_gb * 1e9:
        raise ValueError(
            f"activations.cache would take {needed / 1e9:.3g} GB, more than activations.cache_gb={config.cache_gb:g}"
            f"{instead}, raise activations.cache_gb, or leave activations.cache empty"
        )
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise ValueError(
            f"activations.cache would take {needed / 1e9:.3g} GB, and {parent} has {free / 1e9:.3g} GB free{instead},"
            " or name another folder"
        )


@contextlib.contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Other runs that look for the same folder wait until the block ends; a killed run's claim ends with it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another run that looks after the activations in {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # some network file systems have no locks
            pass
        yield


class Writer:
    """Computes activations into the files of a folder, several processes at once.

    Args:
        loaded: the model.
        rows: token ids, [rows, context_size].
        sites: where to read.
        special: token ids to leave out.
        dtype: on disk.
        folder: where to write; not the final name.
    """

    def __init__(
        self,
        loaded: Loaded,
        rows: Tensor,
        sites: Sequence[Site],
        special: Sequence[int],
        dtype: torch.dtype,
        folder: Path,
    ):
        self.loaded, self.rows, self.sites = loaded, rows, list(sites)
        self.dtype, self.folder = dtype, folder
        self.text = text_mask(rows, special)
        self.tokens = int(self.text.sum())

    def sizes(self) -> dict[str, int]:
        """File name -> bytes."""
        return {file_name(site): self.tokens * site.width * self.dtype.itemsize for site in self.sites}

    def prepare(self) -> None:
        """Make the folder and its files in full size; what an interrupted run left is removed."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with removed_on_error(self.folder):
            self.folder.mkdir(parents=True)
            for name, size in self.sizes().items():
                with (self.folder / name).open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, size)  # a full disk is told now

    def write(self, rank: int, world_size: int) -> None:
        """Write this process's share, every `world_size`-th forward pass, and the sums of it.

        Raises:
            ValueError: activations are NaN or infinite.
        """
        at_once = rows_at_once(self.rows.shape[1])
        firsts = range(0, len(self.rows), at_once)[rank::world_size]
        before = torch.cat([torch.zeros(1, dtype=torch.long), self.text.sum(1).cumsum(0)])  # tokens before each row
        sums = {site.name: torch.zeros(site.width, dtype=torch.float64) for site in self.sites}
        lengths = dict.fromkeys(sums, 0.0)
        with contextlib.ExitStack() as stack:
            files = {site.name: stack.enter_context((self.folder / file_name(site)).open("r+b")) for site in self.sites}
            for first in progress(firsts, "activations to disk", len(firsts)):
                for name, x in self._tokens(first, min(first + at_once, len(self.rows))).items():
                    sums[name] += x.sum(0, dtype=torch.float64)
                    lengths[name] += float(norms(x).sum(dtype=torch.float64))
                    files[name].seek(int(before[first]) * x.shape[1] * x.element_size())
                    files[name].write(x.flatten().view(torch.uint8).numpy().data)
        totals = {name: {"sum": total.tolist(), "norm": lengths[name]} for name, total in sums.items()}
        shards.barrier()
        write_json(self.folder / f"sums.{rank}.json", totals)

    def _tokens(self, first: int, last: int) -> dict[str, Tensor]:
        """Activations of the text of rows `first` to `last`, as they go to disk: site name -> [n, width]."""
        captured = capture(self.loaded.model, self.sites, self.rows[first:last].to(self.loaded.model.device))
        found = {name: x[self.text[first:last].to(x.device)] for name, x in captured.items()}
        for name, x in found.items():
            if not x.sum(dtype=torch.float64).isfinite():
                raise ValueError(f"rows {first} to {last - 1} of the text: activations at {name} are NaN or infinite")
        return {name: x.to(self.dtype).cpu() for name, x in found.items()}

    def finish(self, identity: dict[str, Any], world_size: int) -> None:
        """Write meta.json from the sums of every process, and bring all to the disk."""
        parts = [self.folder / f"sums.{rank}.json" for rank in range(world_size)]
        totals = [read_json(part) for part in parts]
        sites = {
            site.name: {
                "module": site.module,
                "file": file_name(site),
                "width": site.width,
                "mean": [sum(x) / self.tokens for x in zip(*(part[site.name]["sum"] for part in totals), strict=True)],
                "mean_norm": sum(part[site.name]["norm"] for part in totals) / self.tokens,
            }
            for site in self.sites
        }
        for part in parts:
            part.unlink()
        for name in self.sizes():
            flush(self.folder / name)
        first = int(self.text[: rows_at_once(self.rows.shape[1])].sum())
        meta = {"identity": identity, "tokens": self.tokens, "first_pass": first, "sites": sites}
        write_json(self.folder / "meta.json", meta)


def file_name(site: Site) -> str:
    """File of a site: named by its module, whatever the site is called."""
    return f"{site.module}.bin"


class CachedStream(ShuffledStream):
    """A `ShuffledStream` of activations on disk: every token exactly once an epoch, each epoch in another order.

    An epoch permutes blocks of tokens; a buffer takes the next blocks and permutes its tokens, those of an epoch that
    ends in it before those of the next. No language model is run.

    Args:
        folder: of `cached_activations`.
        sites: where activations were taken.
        device: where batches are served.
        batch_size: tokens a batch, over all processes.
        buffer_tokens: tokens shuffled together.
        seed: of the order.
        rank: this process.
        world_size: processes.
        outlier_norm: as in `ShuffledStream`, and so are the following.
        prefetch: read ahead in a thread.
        state: where to go on.

    Raises:
        ValueError: there are fewer tokens than a batch.
    """

    def __init__(
        self,
        folder: Path,
        sites: Sequence[Site],
        device: torch.device,
        batch_size: int,
        buffer_tokens: int = 65_536,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        outlier_norm: float | None = None,
        prefetch: bool = False,
        state: dict[str, Any] | None = None,
    ):
        meta = read_json(folder / "meta.json")
        self.tokens: int = meta["tokens"]
        self.first_pass: int = meta["first_pass"]
        refuse_short(self.tokens, batch_size)
        dtype = getattr(torch, meta["identity"]["dtype"])
        super().__init__(
            sites,
            device,
            dtype,
            batch_size,
            buffer_tokens,
            seed,
            rank,
            world_size,
            outlier_norm,
            prefetch,
            state or {"fill": 0, "step": 0, "cursor": {}},
        )
        self.files = {
            site.name: torch.from_file(
                str(folder / file_name(site)), shared=False, size=self.tokens * site.width, dtype=dtype
            ).view(self.tokens, site.width)
            for site in sites
        }
        self.block = max(1, min(BLOCK_TOKENS, self.capacity // 64))  # small buffers hold many blocks too
        self._order: tuple[int, Tensor] | None = None

    def _plan(self, index: int, cursor: Cursor) -> tuple[Tensor, Iterable[Chunk], Cursor]:
        generator = seeded(self.seed, 1, index)
        runs: list[tuple[int, int]] = []
        places = []
        at, last = index * self.capacity, (index + 1) * self.capacity
        while at < last:
            epoch, first = divmod(at, self.tokens)
            number = min(self.tokens - first, last - at)
            runs += self._runs(epoch, first, number)
            places.append(torch.randperm(number, generator=generator) + (at - index * self.capacity))
            at += number
        mine = slice(self.rank, None, self.world_size)
        pieces = torch.cat(places).split([length for _, length in runs])[mine]
        return torch.cat([places[0][:0], *pieces]), self._read(runs[mine]), {}

    def _runs(self, epoch: int, first: int, number: int) -> list[tuple[int, int]]:
        """Where on disk the tokens `first` to `first + number` of an epoch lie: starts and lengths."""
        if self._order is None or self._order[0] != epoch:
            blocks = -(-self.tokens // self.block)
            self._order = (epoch, torch.randperm(blocks, generator=seeded(self.seed, 0, epoch)))
        starts = self._order[1] * self.block  # [blocks]
        ends = (self.tokens - starts).clamp(max=self.block).cumsum(0)  # in the order of the epoch
        runs, block = [], int(torch.searchsorted(ends, first, right=True))
        while number > 0:
            left = int(ends[block]) - first
            length = min(left, number)
            begin = min(int(starts[block]) + self.block, self.tokens) - left
            runs.append((begin, length))
            first, number, block = first + length, number - length, block + 1
        return runs

    def _read(self, runs: list[tuple[int, int]]) -> Iterator[Chunk]:
        for start, length in runs:
            found = {name: x[start : start + length].to(self.device) for name, x in self.files.items()}
            yield torch.arange(length), found

    def _first_tokens(self) -> dict[str, Tensor]:
        return {name: x[: self.first_pass] for name, x in self.files.items()}
