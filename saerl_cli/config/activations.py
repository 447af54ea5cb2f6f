"""Settings of the stream of activations that SAEs are trained on."""

from dataclasses import dataclass

from saerl_cli.config.groups import refuse_unless


@dataclass
class ActivationsConfig:
    """How activations are shuffled, filtered and kept."""

    buffer_tokens: int = 65_536
    """Activations shuffled together before they are served, at least one batch."""
    outlier_norm: float | None = None
    """Leave out tokens whose activation is longer than so many times the median; all are kept when empty."""
    prefetch: bool = False
    """Compute the next buffer in a thread while the last one is used."""
    cache: str | None = None
    """Folder in which activations are kept, so that further runs on the same model, text and sites read them."""
    cache_gb: float = 50.0
    """Refuse a cache that would grow beyond so many gigabytes."""

    def __post_init__(self) -> None:
        refuse_unless(self.buffer_tokens >= 1, f"activations.buffer_tokens must be >= 1, got {self.buffer_tokens}")
        refuse_unless(
            self.outlier_norm is None or self.outlier_norm > 1,
            f"activations.outlier_norm is a multiple of the median norm, > 1, got {self.outlier_norm}",
        )
        refuse_unless(self.cache_gb > 0, f"activations.cache_gb must be > 0, got {self.cache_gb}")
