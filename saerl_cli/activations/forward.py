"""Activations of rows of tokens at sites, from a forward pass that ends where nothing more is needed."""

from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from saerl_cli.models import Site, output_tensor

FORWARD_TOKENS = 8192
"""Tokens a forward pass through the language model."""


def rows_at_once(context_size: int) -> int:
    """Rows of tokens in a forward pass."""
    return max(1, FORWARD_TOKENS // context_size)


class _Done(Exception):  # noqa: N818 (a signal, not an error)
    """Ends a forward pass that has given all that was asked for."""


def capture(
    model: Any, sites: Sequence[Site], input_ids: Tensor, attention_mask: Tensor | None = None
) -> dict[str, Tensor]:
    """Activations at sites, [batch, seq, width] each by site name; layers above the last site are not computed.

    Another thread may run the same model meanwhile: its passes are neither recorded nor ended.
    """
    found: dict[str, Tensor] = {}
    thread = get_ident()

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            if get_ident() != thread:
                return
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
