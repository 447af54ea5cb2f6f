"""A job's objects on torch's meta device, where tensors have shapes and no numbers, and what is counted on them.

Operations are those that torch counts in real passes forward and back, activations the storages that autograd keeps.
Work is an array of two: floating-point operations in products, and passes through the language model.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from saerl_cli.adapter.tuner import on_activation
from saerl_cli.config.groups import LaunchConfig, ModelConfig, ModelKind, Precision
from saerl_cli.models import describe, without_weights

PYTHIA = {  # layers, width, heads, rows of the embedding; an MLP is four times as wide (arXiv 2304.01373)
    "14m": (6, 128, 4, 50304),
    "31m": (6, 256, 8, 50304),
    "70m": (6, 512, 8, 50304),
    "160m": (12, 768, 12, 50304),
    "410m": (24, 1024, 16, 50304),
    "1b": (16, 2048, 8, 50304),
    "1.4b": (24, 2048, 16, 50304),
    "2.8b": (32, 2560, 32, 50304),
    "6.9b": (32, 4096, 32, 50432),
    "12b": (36, 5120, 40, 50688),
}
"""Every size of the suite, so that no network is needed; those trained on deduplicated text have the same shapes."""


def language_model(model: ModelConfig) -> Any:
    """A language model, frozen, in its dtype; a Pythia by its Hub id alone.

    Raises:
        ValueError: a Hub model that is no Pythia and not at hand, or a folder that is no model.
    """
    size = str(model.name).rpartition("/")[2].removeprefix("pythia-").removesuffix("-deduped")
    if model.kind is ModelKind.hub and "pythia-" in str(model.name) and size in PYTHIA:
        layers, width, heads, vocabulary = PYTHIA[size]
        description: Any = SimpleNamespace(
            model_type="gpt_neox", num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads,
            intermediate_size=4 * width, vocab_size=vocabulary, max_position_embeddings=2048,
        )  # fmt: skip
    else:
        description = describe(model)
    return without_weights(description).to(getattr(torch, model.dtype.value)).requires_grad_(False)


def trunk(model: Any) -> nn.Module:
    """A model without its head."""
    return getattr(model, model.base_model_prefix)


def count(tensors: Iterable[Tensor]) -> int:
    """Numbers in tensors."""
    return sum(tensor.numel() for tensor in tensors)


def size(tensors: Iterable[Tensor]) -> float:
    """Bytes of tensors."""
    return float(sum(tensor.nbytes for tensor in tensors))


def weights(model: Any, launch: LaunchConfig, copies: int = 1) -> dict[str, float]:
    """Bytes of a model in one process: all, or its part and what a pass has whole (all but the other blocks)."""
    whole = size(model.parameters())
    if launch.shards == 1:
        return {"language model": copies * whole}
    blocks = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=lambda m: count(m.parameters()))
    others = size(blocks.parameters()) - max(size(block.parameters()) for block in blocks)
    return {"language model": copies * whole / launch.shards, "gathered weights": whole - others}


# --- operations ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sequence:
    """One sequence in a language model; time and memory are linear in the number of sequences.

    Attributes:
        tokens: in it.
        layers: of the model.
        dtype: of the products.
        weights: bytes that a pass reads.
        forward: operations of a pass through the layers, without the head.
        backward: and of the way back to what is trained.
        saved: bytes that autograd keeps.
        head: operations of the head for one token.
        logits: bytes of one token's logits in float32.
        cache: bytes of keys and values.
    """

    tokens: int
    layers: int
    dtype: str
    weights: float
    forward: float
    backward: float
    saved: float
    head: float
    logits: float
    cache: float

    def passes(
        self, rows: float, scored: float = 0, back: bool = False, part: float = 1.0, split: float = 1
    ) -> ndarray:
        """Work of some sequences through the model.

        Args:
            rows: how many.
            scored: tokens of each of which the head gives logits.
            back: and back.
            part: of the layers on the way forward.
            split: passes that they are cut into.
        """
        flops = self.forward * part + self.backward * back + scored * self.head * (1 + 2 * back)
        return np.array([rows * flops, max(1.0, split) * (1 + back)])

    def generated(self, rows: float, prompt: float, written: float, split: float = 1) -> ndarray:
        """Work of completions of `written` tokens: a pass over the prompts, then one a token."""
        flops = (prompt + written) / self.tokens * self.forward + written * self.head
        return np.array([rows * flops, max(1.0, split) * (1 + written)])


def sequence(
    model: Any, tokens: int, config: ModelConfig, launch: LaunchConfig, added: Mapping[str, int] | None = None
) -> Sequence:
    """Put a sequence through a model, and back to whatever of it requires gradients.

    Args:
        model: the language model, or what PEFT made of it.
        tokens: in the sequence.
        config: with `launch`, says in which dtype products are computed.
        launch: how the job is started.
        added: path -> width of modules to whose output something trained is added.
    """
    dtype = config.dtype.value if launch.mixed_precision is Precision.no else "bfloat16"
    model = (model.get_base_model() if hasattr(model, "get_base_model") else model).to(getattr(torch, dtype))
    hooks = [model.get_submodule(path).register_forward_hook(adding(width)) for path, width in (added or {}).items()]
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as forward, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = trunk(model)(input_ids=ids, use_cache=True)
    with FlopCounterMode(display=False) as backward:
        if out.last_hidden_state.requires_grad:
            out.last_hidden_state.sum().backward()
    for hook in hooks:
        hook.remove()
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    saved = sum(storage.nbytes() for key, storage in kept.items() if key not in own)
    layers, head = out.past_key_values.layers, model.get_output_embeddings().weight  # head: [vocabulary, width]
    cache = size(tensor for layer in layers for tensor in (layer.keys, layer.values))
    return Sequence(
        tokens, len(layers), dtype, size(model.parameters()), forward.get_total_flops(), backward.get_total_flops(),
        saved, 2.0 * head.numel(), 4.0 * head.shape[0], cache,
    )  # fmt: skip


def adding(width: int) -> Callable[..., Any]:
    """A hook that adds a trained vector to a module's output: the way back ends where coefficients are."""
    vector = torch.zeros(width, device="meta", requires_grad=True)
    return lambda module, inputs, output: on_activation(output, lambda hidden: hidden + vector.to(hidden.dtype))


# --- a job -----------------------------------------------------------------------------------------------------------


@dataclass
class Estimate:
    """What is known of a job from its settings; memory and work are those of one process.

    Attributes:
        parameters: numbers, by what they are.
        stays: bytes held from beginning to end, by what they are.
        one: a sequence of it.
        measurement: work of all that is measured, from first to last.
        measuring: bytes that this holds.
        repeated: what the job repeats, `steps` or `phases`; empty where it repeats nothing.
        count: how often.
        once: work of one of them.
        holds: bytes that it holds.
        disk: bytes written, by what they are.
        notes: what was assumed.
    """

    parameters: dict[str, int]
    stays: dict[str, float]
    one: Sequence
    measurement: ndarray
    measuring: float
    repeated: str = ""
    count: int = 0
    once: ndarray = field(default_factory=lambda: np.zeros(2))
    holds: float = 0.0
    disk: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
