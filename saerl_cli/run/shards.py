"""A model split over the processes of a job: a part of every weight in each, whole weights only while a block runs.

transformers loads such models with torch's FSDP2. In every forward pass each block's weights are gathered from all
processes, so all must take part in a pass even where only some of them have work: when completions end after different
numbers of tokens, when batches do not go round, while the first process looks at samples. That is what this file adds:
before a pass the processes agree whose it is, the others hand over their parts (`_follow`), and `meet` ends a stretch of
passes in which each process did its own. Which pass that is, and how far down the model it goes, makes no difference.

Parts are gathered into the very numbers that were split, so that what a frozen model computes is equal to the bit.
"""

from collections.abc import Iterable
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

    model: "nn.Module"
    order: "list[Any]"

    def without(self) -> tuple[int, int]:
        """Which modules a pass through the model as it is now leaves out: the first, and how many follow each other."""
        inside = {id(module) for module in self.model.modules()}
        left_out = [place for place, module in enumerate(self.order) if id(module) not in inside]
        return (left_out[0], len(left_out)) if left_out else (0, 0)


_splits: list[Split] = []
"""Of this process; the same in all, in the same order."""


def join(model: Any) -> None:
    """Let a model that transformers has split take part; every process must, with the same models in the same order."""
    import torch
    from torch.distributed.fsdp import FSDPModule

    model.set_reshard_after_forward(True)  # every pass gathers each block once, whatever passes came before
    order: list[Any] = []
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    hooks = [module.register_forward_pre_hook(lambda module, _: order.append(module)) for module in modules]
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    number = len(_splits)
    _splits.append(Split(model, unique(order)))
    model.register_forward_pre_hook(lambda *_: _before_pass(number), prepend=True)


def unique(modules: Iterable[Any]) -> list[Any]:
    """Modules that gather weights together stand for one another: the first of each group."""
    first = {id(module._get_fsdp_state()): module for module in reversed(list(modules))}
    return [module for module in dict.fromkeys(first[id(m._get_fsdp_state())] for m in modules)]


def leave_all() -> None:
    """Forget the models of this process."""
    _splits.clear()


# --- passes ----------------------------------------------------------------------------------------------------------


def meet() -> None:
    """End a stretch in which processes made passes of their own: take part in the others' until all have come here."""
    if _splits:
        while turn := _turn(NOTHING):
            _follow(turn)


def _before_pass(number: int) -> None:
    """Wait, helping, until the pass that this process is about to make is the one that is made."""
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
    for place, module in enumerate(_splits[number - 1].order):
        if not first <= place < first + count:
            module.unshard()
            module.reshard()


# --- tensors ---------------------------------------------------------------------------------------------------------


def is_split(model: Any) -> bool:
    """Whether a model is split over the processes."""
    return any(split.model is model for split in _splits)


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
