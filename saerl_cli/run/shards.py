"""A model split over the processes of a job: a part of every weight in each, whole weights only while a block runs.

transformers loads such models with torch's FSDP2. In every forward pass each block's weights are gathered from all
processes, so all must take part in a pass even where only some of them have work: when completions end after different
numbers of tokens, when batches do not go round, while the first process looks at samples. That is what this file adds:
before a pass the processes agree whose it is, and the others hand over their parts (`_follow`); `barrier` ends a
stretch of passes in which each process did its own. Blocks may be left out of a pass: those of a model's upper end, or
what is not computed again.

Parts are gathered into the very numbers that were split, so that what a frozen model computes is equal to the bit.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

Pass = tuple[int, int, int]
"""A model's number from 1 on; the first block that is left out of it, and how many are."""
NOTHING: Pass = (0, 0, 0)


@dataclass(frozen=True)
class Split:
    """A model that takes part, and its modules that gather weights, in the order in which they run."""

    model: Any
    order: "list[Any]"
    whole_for_sampling: bool
    """Whether it is gathered once before completions are sampled, instead of for every token."""

    def without(self) -> tuple[int, int]:
        """Which modules a pass through the model as it is now leaves out: the first, and how many follow each other."""
        inside = {id(module) for module in self.model.modules()}
        left_out = [place for place, module in enumerate(self.order) if id(module) not in inside]
        return (left_out[0], len(left_out)) if left_out else (0, 0)


_splits: list[Split] = []
"""Of this process; the same in all, in the same order."""
_gathered: set[int] = set()
"""Numbers of the models that this process has whole for a while."""


def split(model: "nn.Module", blocks: "Iterable[nn.Module]") -> None:
    """Split a model that every process has whole, and let it take part.

    Args:
        model: the same in all.
        blocks: its layers, each to be gathered by itself; the rest of the model is gathered for a whole pass.
    """
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    join(model)


def join(model: Any, whole_for_sampling: bool = False) -> None:
    """Let a model that transformers has split take part; every process must, with the same models in the same order.

    Args:
        model: the model.
        whole_for_sampling: gather it once before completions are sampled.

    Raises:
        ValueError: its blocks are not known, so that its weights would be gathered all at once.
    """
    import torch
    from torch.distributed.fsdp import FSDPModule

    model.set_reshard_after_forward(True)  # every pass gathers each block once, whatever passes came before
    order: list[Any] = []
    modules: list[Any] = [module for module in model.modules() if isinstance(module, FSDPModule)]
    hooks = [module.register_forward_pre_hook(lambda module, _: order.append(module)) for module in modules]
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    if len(unique(order)) == 1:
        raise ValueError(
            f"launch.sharding=fsdp2 does not know the blocks of this architecture ({model.config.model_type}); write"
            " launch.sharding=none"
        )
    number = len(_splits)
    _splits.append(Split(model, unique(order), whole_for_sampling))
    model.register_forward_pre_hook(lambda *_: _before_pass(number), prepend=True)


def unique(modules: Iterable[Any]) -> list[Any]:
    """Modules that gather weights together stand for one another: the first of each group."""
    first = {id(module._get_fsdp_state()): module for module in reversed(list(modules))}
    return [module for module in dict.fromkeys(first[id(m._get_fsdp_state())] for m in modules)]


def leave(model: Any) -> None:
    """Forget a model that no process runs any more; the last that joined."""
    assert _splits[-1].model is model
    _splits.pop()


# --- passes ----------------------------------------------------------------------------------------------------------


def barrier() -> None:
    """Take part in the passes of the other processes until all have come here; nothing where no model is split."""
    if _splits:
        while turn := _turn(NOTHING):
            _follow(turn)


@contextmanager
def whole_for_sampling(model: Any) -> "Iterator[None]":
    """Inside, this process has a model whole where that is wanted, so that its passes need nobody.

    Args:
        model: one that is split, or an adapter's around it; any other is left as it is.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    numbers = [number for number, split in enumerate(_splits) if split.model is base and split.whole_for_sampling]
    if not numbers:
        yield
        return
    (number,) = numbers
    _before_pass(number)  # it gathers what a pass gathers
    base.set_reshard_after_forward(False)
    for module in _splits[number].order:
        module.unshard()
    _gathered.add(number)
    try:
        yield
    finally:
        _gathered.discard(number)
        base.set_reshard_after_forward(True)
        for module in _splits[number].order:
            module.reshard()


def _before_pass(number: int) -> None:
    """Wait, helping, until the pass that this process is about to make is the one that is made."""
    if number in _gathered:
        return
    wanted = (number + 1, *_splits[number].without())
    while (turn := _turn(wanted)) not in (wanted, None):
        _follow(turn)


def _turn(wanted: Pass) -> Pass | None:
    """Tell all processes what this one wants; what is to be made now, None when nobody wants anything."""
    import torch
    from torch import distributed

    own = torch.tensor(wanted, device=_splits[0].model.device)
    everyone = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everyone, own)
    passes = {tuple(row) for row in torch.stack(everyone).tolist()} - {NOTHING}
    return min(passes, default=None)


def _follow(turn: Pass) -> None:
    """Hand over this process's parts for a pass that others make."""
    number, first, count = turn
    assert number - 1 not in _gathered, "a process that has a model whole cannot hand over parts of it"
    for place, module in enumerate(_splits[number - 1].order):
        if not first <= place < first + count:
            module.unshard()
            module.reshard()


# --- tensors ---------------------------------------------------------------------------------------------------------


def is_split(model: Any) -> bool:
    """Whether a model is split over the processes."""
    return any(split.model is model for split in _splits)


def gathers(module: Any) -> bool:
    """Whether a module of a split model gathers its weights by itself."""
    return hasattr(module, "unshard")


def is_part(tensor: Any) -> bool:
    """Whether a tensor is split over the processes."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: "Tensor") -> "Tensor":
    """A tensor without gradient, gathered where it is split; every process must ask."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_part(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def on_cpu(named: "Iterable[tuple[str, Tensor]]", wanted: bool) -> "dict[str, Tensor]":
    """Whole tensors by name, on the CPU; every process must ask, those that do not want them get none."""
    found = {}
    for name, tensor in named:
        gathered = whole(tensor)  # one at a time: together they need not fit beside the parts
        if wanted:
            found[name] = gathered.cpu().contiguous()
    return found


def own(tensor: "Tensor") -> "Tensor":
    """This process's part of a tensor; all of one that is not split."""
    return tensor.to_local() if is_part(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def split_as(values: "Tensor", like: Any) -> "Tensor":
    """Whole values, the same in every process, split as another tensor is; as they are where it is not."""
    if not is_part(like):
        return values
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def optimizer_state(saved: "Mapping[str, Tensor]", optimizer: Any) -> "dict[int, dict[str, Tensor]]":
    """The `state` of an optimiser from whole tensors named `PARAMETER.KEY`, split as its parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in saved.items():
        index, key = name.split(".", 1)
        like = parameters[int(index)]
        moment = split_as(tensor, like) if tensor.shape == like.shape else tensor  # else the count of steps
        state.setdefault(int(index), {})[key] = moment
    return state


def clip(parameters: "Iterable[nn.Parameter]", longest: float) -> "Tensor":
    """Scale gradients down to a joint norm; returns what it was, over the parts of all processes."""
    from torch.nn.utils import clip_grads_with_norm_, get_total_norm

    parameters = list(parameters)
    norm = whole(get_total_norm([p.grad for p in parameters if p.grad is not None]))
    clip_grads_with_norm_(parameters, longest, norm)
    return norm
