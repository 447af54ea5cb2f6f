"""The stream that the settings ask for."""

from collections.abc import Callable, Sequence
from typing import Any

from saerl_cli.activations.cache import CachedStream, cached_activations
from saerl_cli.activations.stream import ActivationStream, ShuffledStream, refuse_short
from saerl_cli.activations.tokens import StreamedRows, special_ids, text_mask, token_rows
from saerl_cli.config.activations import ActivationsConfig, check_stream
from saerl_cli.config.groups import DataConfig, ModelConfig
from saerl_cli.data.documents import LONGEST_CONTEXT, Counts, documents, row_length
from saerl_cli.models import Loaded, Site, resolve_sites


def open_stream(
    loaded: Loaded,
    model: ModelConfig,
    data: DataConfig,
    activations: ActivationsConfig,
    sites: Sequence[Site],
    batch_size: int,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    state: dict[str, Any] | None = None,
) -> ShuffledStream:
    """Shuffled activations of the training text: computed from text in memory or streamed, or read from a cache.

    Args:
        loaded: the model, on the device of this process.
        model: its settings.
        data: the text.
        activations: buffer, filter, prefetch and cache.
        sites: where to read.
        batch_size: tokens a batch, over all processes.
        seed: of the order.
        rank: this process.
        world_size: processes.
        barrier: returns when every process has called it; needed by a cache that several processes write.
        state: where to go on, of an earlier stream's `state()`.

    Raises:
        ValueError: settings that contradict each other, text that cannot be read or is too short, a cache too large.
    """
    check_stream(data, activations, batch_size)
    length, special = row_length(data, loaded.context_size), special_ids(loaded.tokenizer)
    order = (batch_size, activations.buffer(batch_size), seed)
    more: dict[str, Any] = {
        "rank": rank,
        "world_size": world_size,
        "outlier_norm": activations.outlier_norm,
        "prefetch": activations.prefetch,
        "state": state,
    }
    if data.stream:
        streamed = StreamedRows(data, loaded.tokenizer, length, special)
        return ActivationStream(loaded.model, streamed, sites, special, *order, **more)
    counts = Counts()
    texts = documents(data, model, "train", counts)
    rows = token_rows(texts, loaded.tokenizer, length)
    if activations.cache:
        refuse_short(int(text_mask(rows, special).sum()), batch_size)
        folder = cached_activations(loaded, rows, sites, special, activations, rank, world_size, barrier)
        stream: ShuffledStream = CachedStream(folder, sites, loaded.model.device, *order, **more)
    else:
        stream = ActivationStream(loaded.model, rows, sites, special, *order, **more)
    stream.counts = counts
    return stream


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
