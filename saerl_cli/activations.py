"""Documents -> rows of tokens -> activations at sites -> shuffled batches.

The order of everything is a pure function of (seed, step): a resumed stream recomputes its buffer and goes on with the
batch that an uninterrupted one would serve.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from typing import TYPE_CHECKING, Any

from saerl_cli.config.groups import DataConfig, DataKind, ModelConfig, ModelKind
from saerl_cli.models import Loaded, Site, output_tensor, quiet_transformers, resolve_sites, separator_id
from saerl_cli.world.text import read_documents, split_documents, text_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FORWARD_TOKENS = 8192
"""Tokens a forward pass through the language model."""
LONGEST_CONTEXT = 512
"""Tokens a row where the settings leave it open and the model could read more."""


# --- documents -------------------------------------------------------------------------------------------------------


def documents(data: DataConfig, model: ModelConfig, split: str) -> list[str]:
    """The texts of a split; the last `data.heldout` share of the documents is `heldout`, the rest `train`.

    Imports no torch, so that checks before a run can call it.

    Args:
        data: which text.
        model: the embedded language's settings, for `data=planted`.
        split: `train` or `heldout`.

    Raises:
        ValueError: missing, empty or malformed text, naming file and line.
    """
    if data.kind is DataKind.planted:
        return [review.text for review in planted_reviews(data, model, split)]
    texts = hub_documents(data) if data.kind is DataKind.hub else read_documents(data)
    train, heldout = split_documents(texts, data)
    return heldout if split == "heldout" else train


def planted_reviews(data: DataConfig, model: ModelConfig, split: str) -> list[Any]:
    """The labelled documents behind `documents` for `data=planted`, in the same order."""
    from saerl_cli.world.cache import planted_documents

    if model.kind is not ModelKind.planted:
        raise ValueError("data=planted belongs to model=planted; write data=text data.path=FILE for another model")
    number = min(data.max_documents or model.world.documents, model.world.documents)
    if split == "heldout":
        number = max(1, round(number * data.heldout))
    return list(islice(planted_documents(model.world, split), number))


def hub_documents(data: DataConfig) -> list[str]:
    """The documents of a Hub data set, at most `data.max_documents`; streamed when that is given.

    Raises:
        ValueError: no network, no such data set or column.
    """
    import datasets

    try:
        table = datasets.load_dataset(
            str(data.name), data.subset, split=data.split, streaming=data.max_documents is not None
        )
        rows = list(islice(table, data.max_documents))
    except Exception as error:  # network, name, configuration and format errors share no base class
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read data.name={data.name}: {line}; data=text data.path=FILE works offline") from None
    texts = [text_of(row, data.field, f"{data.name} row {number}") for number, row in enumerate(rows, start=1)]
    return [text for text in texts if text.strip()]


# --- tokens ----------------------------------------------------------------------------------------------------------


def row_length(data: DataConfig, model_context: int) -> int:
    """Tokens a row: `data.context_size`, or the model's context, at most `LONGEST_CONTEXT`.

    Raises:
        ValueError: the settings ask for more than the model can read.
    """
    if data.context_size is not None and data.context_size > model_context:
        raise ValueError(f"data.context_size={data.context_size} exceeds the model's context of {model_context} tokens")
    return data.context_size or min(model_context, LONGEST_CONTEXT)


def token_rows(texts: Sequence[str], tokenizer: Any, context_size: int) -> "Tensor":
    """Documents packed into rows of token ids, [rows, context_size].

    Raises:
        ValueError: there is no text.
    """
    with quiet_transformers():  # a document longer than the context is cut here, not by the tokenizer
        encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return pack(encoded, separator_id(tokenizer), context_size)


def pack(encoded: Sequence[Sequence[int]], separator: int, context_size: int) -> "Tensor":
    """Lay documents end to end, a separator after each, in rows that start where a document starts.

    A document that the end of a row cuts begins the next row anew, so that what follows is read in its whole context;
    one longer than a row goes on where it was cut. Every row starts with a separator: models park attention on the
    first position of a context, whatever is there, and so that odd vector belongs to a token that is masked. The last
    row is filled up with separators.

    Returns:
        Token ids, [rows, context_size].

    Raises:
        ValueError: there is nothing to pack.
    """
    import torch

    body = context_size - 1
    rows, row = [], []
    for document in filter(len, encoded):
        rest = [*document, separator]
        while rest:
            taken = rest[: body - len(row)]
            row += taken
            if len(row) == body:
                rows.append(row)
                row = []
            if len(taken) == len(rest) or len(rest) > body:
                rest = rest[len(taken) :]
    if not rows and not row:
        raise ValueError("the text has no tokens")
    if row:
        rows.append(row + [separator] * (body - len(row)))
    return torch.tensor([[separator, *row] for row in rows])


def special_ids(tokenizer: Any) -> list[int]:
    """Tokens that are no text (pad, bos, eos, separators): left out of training and of every metric."""
    return sorted({*tokenizer.all_special_ids, separator_id(tokenizer)})


def text_mask(rows: "Tensor", special: Sequence[int]) -> "Tensor":
    """True where a token is text: [rows, context_size], bool."""
    import torch

    return ~torch.isin(rows, torch.tensor(special, device=rows.device))


# --- activations -----------------------------------------------------------------------------------------------------


class _Done(Exception):  # noqa: N818 (a signal, not an error)
    """Ends a forward pass that has given all that was asked for."""


def capture(
    model: Any, sites: Sequence[Site], input_ids: "Tensor", attention_mask: "Tensor | None" = None
) -> dict[str, "Tensor"]:
    """Activations at sites, [batch, seq, width] each by site name; layers above the last site are not computed."""
    import torch

    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            found[name] = output_tensor(output).detach()
            if len(found) == len(sites):
                raise _Done

        return hook

    hooks = [model.get_submodule(site.module).register_forward_hook(keep(site.name)) for site in sites]
    try:
        with torch.no_grad():
            model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    except _Done:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return found


class ActivationStream:
    """An endless iterator of shuffled activation batches, `dict` of site name -> [n, width].

    Rows are read in an order reshuffled every epoch. A buffer is filled from as many rows as hold
    `buffer_tokens // batch_size` batches of text, permuted once, and served in slices; what remains of its last row is
    dropped. With several processes each computes every `world_size`-th row and serves its share of every batch, so that
    the shares of all processes are the batch that one process would serve.

    Args:
        model: a language model.
        rows: token ids, [rows, context_size].
        sites: where to read.
        special: token ids to leave out.
        batch_size: tokens a batch, over all processes.
        buffer_tokens: tokens shuffled together.
        seed: of the order.
        start_step: batches to skip, without computing them.
        rank: this process.
        world_size: processes.

    Attributes:
        positions: place in the whole batch of each row served last, [n].

    Raises:
        ValueError: the rows hold less text than one batch.
    """

    def __init__(
        self,
        model: Any,
        rows: "Tensor",
        sites: Sequence[Site],
        special: Sequence[int],
        batch_size: int,
        buffer_tokens: int = 65_536,
        seed: int = 0,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.model, self.rows, self.sites = model, rows, list(sites)
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.text = text_mask(rows, special)  # [rows, context_size]
        self.batches_per_fill = max(1, buffer_tokens // batch_size)
        self.positions: Tensor | None = None
        available = int(self.text.sum())
        if available < batch_size:
            raise ValueError(
                f"the text holds {available} tokens, less than one batch of sae.batch_size={batch_size};"
                " lower it or give more text"
            )
        self._batches = self._serve(start_step)

    def __iter__(self) -> Iterator[dict[str, "Tensor"]]:
        return self

    def __next__(self) -> dict[str, "Tensor"]:
        batch, self.positions = next(self._batches)
        return batch

    def _generator(self, purpose: int, index: int) -> "torch.Generator":
        """Randomness of epoch (purpose 0) or fill (purpose 1) number `index`."""
        import torch

        return torch.Generator().manual_seed(((self.seed * 2 + purpose) * 1_000_003 + index) % 2**63)

    def _row_order(self) -> Iterator[int]:
        import torch

        for epoch in count():
            yield from torch.randperm(len(self.rows), generator=self._generator(0, epoch)).tolist()

    def _fills(self) -> Iterator[list[int]]:
        """The rows of each buffer."""
        lengths = self.text.sum(1).tolist()
        order = self._row_order()
        while True:
            missing, chosen = self.batches_per_fill * self.batch_size, []
            while missing > 0:
                chosen.append(next(order))
                missing -= lengths[chosen[-1]]
            yield chosen

    def _serve(self, start_step: int) -> Iterator[tuple[dict[str, "Tensor"], "Tensor"]]:
        import torch

        first_fill, first_batch = divmod(start_step, self.batches_per_fill)
        for index, chosen in enumerate(self._fills()):
            if index < first_fill:
                continue
            buffer, places = self._fill(index, chosen)
            edges = torch.arange(self.batches_per_fill + 1) * self.batch_size
            cuts = torch.searchsorted(places, edges).tolist()
            for number in range(first_batch if index == first_fill else 0, self.batches_per_fill):
                share = slice(cuts[number], cuts[number + 1])
                yield {name: x[share] for name, x in buffer.items()}, places[share] - number * self.batch_size

    def _fill(self, index: int, chosen: list[int]) -> tuple[dict[str, "Tensor"], "Tensor"]:
        """This process's activations of a buffer in the order of serving, and their places in it, [n] ascending."""
        import torch

        lengths = self.text[chosen].sum(1)
        place = torch.randperm(int(lengths.sum()), generator=self._generator(1, index))  # place of each token
        mine = list(range(self.rank, len(chosen), self.world_size))
        starts = (lengths.cumsum(0) - lengths).tolist()
        own = torch.cat([place[starts[i] : starts[i] + int(lengths[i])] for i in mine] or [place[:0]])
        places, order = own.sort()
        activations = self._activations([chosen[i] for i in mine])
        return {name: x[order.to(x.device)] for name, x in activations.items()}, places

    def _activations(self, chosen: list[int]) -> dict[str, "Tensor"]:
        """Activations of the text tokens of rows, in order: [n, width] by site."""
        import torch

        device = self.model.get_input_embeddings().weight.device
        at_once = max(1, FORWARD_TOKENS // self.rows.shape[1])
        parts: dict[str, list[Tensor]] = {
            site.name: [x] for site, x in zip(self.sites, self._none(device), strict=True)
        }
        for start in range(0, len(chosen), at_once):
            rows = chosen[start : start + at_once]
            captured = capture(self.model, self.sites, self.rows[rows].to(device))
            text = self.text[rows].to(device)
            for name, x in captured.items():
                parts[name].append(x[text])  # [n, width]
        return {name: torch.cat(tensors) for name, tensors in parts.items()}

    def _none(self, device: "torch.device") -> list["Tensor"]:
        """Empty activations, which keep the shapes right in a process that got no rows."""
        import torch

        dtype = self.model.get_input_embeddings().weight.dtype
        return [torch.empty(0, site.width, dtype=dtype, device=device) for site in self.sites]


def activation_batches(
    loaded: Loaded,
    texts: Sequence[str],
    site_names: Sequence[str],
    batch_size: int = 2048,
    context_size: int | None = None,
    buffer_tokens: int = 65_536,
    seed: int = 0,
) -> ActivationStream:
    """Shuffled activations of a model on texts: an endless iterator of `dict` of site name -> [batch_size, width].

    Example:
        `train_saes(activation_batches(load_model(config), texts, ["mlp_out.3"]), {"mlp_out.3": SaeConfig()})`
    """
    length = context_size or min(loaded.context_size, LONGEST_CONTEXT)
    rows = token_rows(texts, loaded.tokenizer, length)
    sites = resolve_sites(site_names, loaded.model)
    return ActivationStream(
        loaded.model, rows, sites, special_ids(loaded.tokenizer), batch_size, max(buffer_tokens, batch_size), seed
    )
