"""What training cannot change in a forward pass, computed once a rollout.

Below the lowest trainable parameter everything is frozen: modules that hold no trainable parameter and whose inputs
depend on none give the same output in the old policy's scoring pass, in the reference's, and in every epoch.
`find_prefix` finds them in any model with any adapter by one small forward pass with gradients switched on. The first
scoring pass over a micro-batch records those outputs which the rest of the model reads. Later passes replay them: the
model's own code runs as always, but recorded modules return what they returned before, and the modules below them
something that nobody reads. Numbers are equal to the bit, because the same tensors are added in the same order.

Outputs are kept as they are, [batch, seq, width] each, so that under bfloat16 autocast they are bfloat16 where the
model's are. Where a recorded output enters an SAE, its active features are kept too, so that nothing is encoded again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from saerl_cli.adapter.coefficients.active_features import ActiveFeatures, active_features, by_sequence, from_sequences
from saerl_cli.adapter.coefficients.layer import SparseCoeffLayer
from saerl_cli.run import shards

Recorded = dict[str, Tensor]
"""Outputs of frozen modules by name, [batch, seq, width] each, codes by `name/values` and so on; a row a sequence."""

CODES = ("values", "features", "counts")


class Prefix:
    """The frozen modules of a model, from outside in: none lies inside another.

    Attributes:
        modules: by name.
        kept: names of those whose output the rest of the model reads.
        readers: the layers with coefficients that wrap a module of `kept`, by that module's name.
        blocks: those of a model that is split over processes which gather their weights by themselves, with where they
            stand: a module and a name in it.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        readers: dict[str, SparseCoeffLayer],
        blocks: dict[str, tuple[nn.Module, str]],
    ):
        self.modules, self.readers, self.blocks = modules, readers, blocks
        self.kept = list(modules)
        self._forms: dict[str, tuple[torch.Size, torch.dtype, tuple]] = {}  # what a module put out but for its numbers

    @contextmanager
    def record(self) -> Iterator[Recorded]:
        """Fill the dictionary that is given with the frozen outputs of one forward pass."""
        recorded: Recorded = {}

        def recording(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                output = forward(*args, **kwargs)
                hidden, rest = parted(output)
                self._forms[name] = (hidden.shape[2:], hidden.dtype, rest)
                if name in self.kept:
                    recorded[name] = hidden.detach()
                    self._record_codes(name, hidden, recorded)
                return output

            return run

        with self._instead(recording):
            yield recorded

    def _record_codes(self, name: str, hidden: Tensor, recorded: Recorded) -> None:
        layer = self.readers.get(name)
        if layer is None:
            return
        x = hidden.detach().flatten(0, -2).to(layer.sae.W_dec.dtype)  # [batch * seq, d_in]
        with torch.autocast(hidden.device.type, enabled=False):
            layer.active = active_features(layer.sae, x)
        if layer.active is not None:
            recorded |= {f"{name}/{key}": rows for key, rows in by_sequence(layer.active, len(hidden)).items()}

    @contextmanager
    def replay(self, recorded: Recorded) -> Iterator[None]:
        """Return what was recorded instead of computing it, in every forward (and recomputation) inside."""
        recorded = {name: aligned(rows) for name, rows in recorded.items()}
        batch, seq = recorded[self.kept[0]].shape[:2]
        codes = {name: self._codes(name, recorded) for name in self.readers}

        def replaying(name: str, _: Callable[..., Any]) -> Callable[..., Any]:
            shape, dtype, rest = self._forms[name]

            def run(*args: Any, **kwargs: Any) -> Any:
                if name in recorded:
                    output = recorded[name]
                    if name in codes:
                        self.readers[name].active = codes[name]
                else:  # nobody reads its numbers, but its shape, dtype and device
                    output = torch.zeros((), dtype=dtype, device=recorded[self.kept[0]].device)
                    output = output.expand(batch, seq, *shape)
                return (output, *rest) if rest else output

            return run

        with self._instead(replaying), self._stand_ins():
            yield

    @contextmanager
    def _stand_ins(self) -> Iterator[None]:
        """Nothing in the place of blocks whose weights are split, so that no process gathers what nobody uses."""
        for name, (parent, child) in self.blocks.items():
            parent._modules[child] = StandIn(self.modules[name])
        try:
            yield
        finally:
            for name, (parent, child) in self.blocks.items():
                parent._modules[child] = self.modules[name]

    def _codes(self, name: str, recorded: Recorded) -> ActiveFeatures | None:
        rows = {key: recorded[f"{name}/{key}"] for key in CODES if f"{name}/{key}" in recorded}
        return from_sequences(rows, self.readers[name].sae.d_sae) if rows else None

    @contextmanager
    def _instead(self, substitute: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
        """Other forwards for the frozen modules; patched on the modules, hence under DDP and checkpointing too."""
        before: dict[str, Any] = {name: vars(module).get("forward") for name, module in self.modules.items()}
        try:
            for name, module in self.modules.items():
                module.forward = substitute(name, module.forward)
            yield
        finally:
            for name, module in self.modules.items():
                del module.forward
                if before[name] is not None:
                    module.forward = before[name]
            for layer in self.readers.values():
                layer.active = None


class StandIn(nn.Module):
    """A module's `forward` and attributes without its weights and hooks."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.of = (module,)  # in a tuple, which hides it from torch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["of"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's own returns."""
        return self.of[0].forward(*args, **kwargs)


def aligned(rows: Tensor) -> Tensor:
    """At the start of a cache line, as a module's fresh output is: kernels may add in another order elsewhere."""
    return rows.clone() if rows.data_ptr() % 64 else rows


def parted(output: Any) -> tuple[Tensor, tuple]:
    """A module's output tensor, and what else it put out."""
    return (output[0], output[1:]) if isinstance(output, tuple) else (output, ())


def take(recorded: Recorded, rows: Any) -> Recorded:
    """Select some of the rows (indices or a slice)."""
    return {name: kept[rows] for name, kept in recorded.items()}


def leave_inputs_alone(model: Any) -> None:
    """Keep transformers, PEFT and TRL from making embeddings' outputs require a gradient.

    They do so whenever activation checkpointing is switched on, for its reentrant form, which saerl never uses;
    gradients would flow through all that is frozen.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hooks = base.get_input_embeddings()._forward_hooks
    for key in [key for key, hook in hooks.items() if hook.__name__.startswith("make_input")]:
        del hooks[key]
    base.enable_input_require_grads = lambda: None


# --- finding it -----------------------------------------------------------------------------------------------------


def find_prefix(model: nn.Module, call: Callable[[], Sequence[Tensor]], shape: tuple[int, int]) -> Prefix | None:
    """The frozen part of a model, or None where there is none worth keeping.

    Args:
        model: with its adapter switched on.
        call: runs the model on a small input and returns what a scoring pass uses of its output.
        shape: of that input, (batch, seq).

    Returns:
        A prefix with which `call` gives the same numbers to the bit (else None).
    """
    modules = frozen_modules(model, call, shape)
    readers = {
        f"{name}.base_layer": layer
        for name, layer in model.named_modules()
        if isinstance(layer, SparseCoeffLayer) and layer.kind != "pre_activation" and f"{name}.base_layer" in modules
    }
    if not any(holds_weights(module) for module in modules.values()):
        return None
    blocks = {name: name.rpartition(".") for name, module in modules.items() if shards.gathers(module)}
    places = {name: (model.get_submodule(parent), child) for name, (parent, _, child) in blocks.items()}
    prefix = Prefix(modules, readers, places)
    with torch.no_grad():
        with prefix.record() as recorded:
            plain = call()
        hidden = {name: recorded[name] for name in modules}
        prefix.kept = [name for name in modules if is_read(prefix, hidden, name, call)]
        if not prefix.kept:
            return None
        prefix.readers = {name: layer for name, layer in readers.items() if name in prefix.kept}
        with prefix.record() as recorded:
            call()
        with prefix.replay(recorded):
            again = call()
    return prefix if all(map(torch.equal, plain, again)) else None


def holds_weights(module: nn.Module) -> bool:
    """Whether a module computes with a matrix."""
    return any(p.dim() > 1 for p in module.parameters())


def is_read(prefix: Prefix, recorded: Recorded, name: str, call: Callable[[], Sequence[Tensor]]) -> bool:
    """Whether NaN put out by a frozen module shows in the result."""
    with prefix.replay(recorded | {name: torch.full_like(recorded[name], torch.nan)}):
        return any(bool(tensor.isnan().any()) for tensor in call())


def frozen_modules(
    model: nn.Module, call: Callable[[], Sequence[Tensor]], shape: tuple[int, int]
) -> dict[str, nn.Module]:
    """The outermost modules without trainable parameters whose inputs need no gradient and which put out one tensor.

    A module that runs more than once in a pass is left out, and so is one inside a frozen one.
    """
    found: dict[str, nn.Module] = {}
    seen: set[str] = set()
    inside: list[tuple[str, bool]] = []  # the modules that are running, and whether each is frozen

    def enter(name: str, module: nn.Module, inputs: Any) -> None:
        needs_gradient = any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(inputs))
        trainable = any(p.requires_grad for p in module.parameters())
        inside.append((name, not needs_gradient and not trainable))

    def leave(name: str, module: nn.Module, output: Any) -> None:
        frozen = inside.pop()[1]
        again = name in seen
        seen.add(name)
        if again:
            found.pop(name, None)
        elif frozen and one_tensor(output, shape):
            for inner in [other for other in found if other.startswith(f"{name}.")]:
                del found[inner]
            found[name] = module

    with ExitStack() as hooks, torch.enable_grad():
        for name, module in model.named_modules():
            handles = (
                module.register_forward_pre_hook(
                    lambda m, args, kwargs, name=name: enter(name, m, (args, kwargs)), with_kwargs=True
                ),
                module.register_forward_hook(lambda m, _, output, name=name: leave(name, m, output)),
            )
            for handle in handles:
                hooks.callback(handle.remove)
        call()
    return found


def one_tensor(output: Any, shape: tuple[int, int]) -> bool:
    """Whether an output is one vector a token without gradient, alone or followed by what is no tensor."""
    if not isinstance(output, Tensor | tuple) or output == ():
        return False
    hidden, rest = parted(output)
    return (
        isinstance(hidden, Tensor)
        and hidden.is_floating_point()
        and not hidden.requires_grad
        and hidden.dim() > 2
        and hidden.shape[:2] == shape
        and not any(isinstance(x, Tensor) for x in tree_leaves(rest))
    )
