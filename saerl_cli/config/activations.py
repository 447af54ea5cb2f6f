"""Settings of the stream of activations that SAEs are trained on."""

from dataclasses import dataclass
from enum import Enum

from saerl_cli.config.groups import DataConfig, refuse_unless
from saerl_cli.config.settings import check_settings, setting

BUFFER_TOKENS = 65_536


class CacheDtype(Enum):
    """Precision of activations on disk."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass
class ActivationsConfig:
    """How activations are shuffled, filtered and kept."""

    buffer_tokens: int | None = setting(None, ">= 1")
    """Activations shuffled together before they are served, at least one batch; 65,536, or four batches where that is
    more, when empty."""
    outlier_norm: float | None = setting(None, "> 1")
    """Leave out tokens whose activation at any site is longer than so many times that site's median norm (10 drops
    attention sinks); all are kept when empty."""
    prefetch: bool = False
    """Compute the next buffer in a thread while the last one is used; takes the memory of two buffers."""
    cache: str | None = None
    """Folder in which activations are kept, so that further runs on the same model, text and sites read them."""
    cache_gb: float = setting(50.0, "> 0", cache=True)
    """Refuse to write activations of more than so many gigabytes (10^9 bytes) to the cache."""
    cache_dtype: CacheDtype = setting(CacheDtype.float32, cache=True)
    """Precision in the cache; bfloat16 halves its size."""

    def __post_init__(self) -> None:
        check_settings(self, "activations")

    def buffer(self, batch_size: int) -> int:
        """`buffer_tokens`, or what stands for it when empty."""
        return self.buffer_tokens or max(BUFFER_TOKENS, 4 * batch_size)


def check_stream(data: DataConfig, activations: ActivationsConfig, batch_size: int) -> None:
    """Refuse text, buffer, cache and batch that contradict each other.

    Raises:
        ValueError: a buffer smaller than a batch, or a cache of streamed text.
    """
    refuse_unless(
        batch_size <= activations.buffer(batch_size),
        f"sae.batch_size={batch_size} exceeds activations.buffer_tokens={activations.buffer_tokens}",
    )
    refuse_unless(
        not (data.stream and activations.cache),
        "activations.cache needs all text at once; write data.stream=false, or leave activations.cache empty",
    )
