"""The processes of a job and what they tell each other; alone, everything is left as it is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from saerl_cli.run import shards

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """All processes of a job, from the view of one of them. What one is asked, all must be asked."""

    rank: int = 0
    size: int = 1

    def total(self, tensor: "Tensor") -> "Tensor":
        """The sum over all processes."""
        if self.size == 1:
            return tensor
        from torch import distributed

        place = "cuda" if distributed.get_backend() == "nccl" else tensor.device  # NCCL sees GPUs alone
        summed = tensor.detach().to(place, copy=True)
        distributed.all_reduce(summed)
        return summed.to(tensor.device)

    def told(self, value: T) -> T:
        """What the first process says."""
        if self.size == 1:
            return value
        from torch import distributed

        box = [value]
        distributed.broadcast_object_list(box)
        return box[0]

    def agree(self, tensors: "Sequence[Tensor]") -> None:
        """Give every process the first one's numbers, in place."""
        if self.size == 1:
            return
        from torch import distributed

        for tensor in tensors:
            distributed.broadcast(tensor, 0)

    def by_batch(self, count: int, batch_size: int, work: Callable[[slice], T]) -> list[T]:
        """`work` of each batch of `count` items, in order: every process does its own batches, and all get all.

        A batch is the same whatever the number of processes, so that its numbers are too.
        """
        batches = [slice(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
        if self.size == 1:
            return [work(batch) for batch in batches]
        from torch import distributed

        own = {number: work(batches[number]) for number in range(self.rank, len(batches), self.size)}
        shards.meet()
        parts: list[Any] = [None] * self.size
        distributed.all_gather_object(parts, own)
        found = {number: result for part in parts for number, result in part.items()}
        return [found[number] for number in range(len(batches))]


ALONE = Team()
