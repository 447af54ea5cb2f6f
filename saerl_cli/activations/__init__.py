"""Documents -> rows of tokens -> activations at sites -> shuffled batches.

What needs no torch is imported here; the rest when it is first used, because checks before a run import this package.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saerl_cli.activations.cache import CachedStream
    from saerl_cli.activations.choose import activation_batches, open_stream
    from saerl_cli.activations.forward import FORWARD_TOKENS, capture
    from saerl_cli.activations.stream import ActivationStream, ShuffledStream
    from saerl_cli.activations.tokens import (
        MemoryRows,
        Packer,
        StreamedRows,
        pack,
        special_ids,
        text_mask,
        token_rows,
    )

LATER = {
    "tokens": ("MemoryRows", "Packer", "StreamedRows", "pack", "special_ids", "text_mask", "token_rows"),
    "forward": ("FORWARD_TOKENS", "capture"),
    "stream": ("ActivationStream", "ShuffledStream"),
    "cache": ("CachedStream",),
    "choose": ("activation_batches", "open_stream"),
}
"""File -> its names that need torch."""

__all__ = [
    "FORWARD_TOKENS",
    "ActivationStream",
    "CachedStream",
    "MemoryRows",
    "Packer",
    "ShuffledStream",
    "StreamedRows",
    "activation_batches",
    "capture",
    "open_stream",
    "pack",
    "special_ids",
    "text_mask",
    "token_rows",
]


def __getattr__(name: str) -> Any:
    """Import a name that needs torch."""
    for file, names in LATER.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{file}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
