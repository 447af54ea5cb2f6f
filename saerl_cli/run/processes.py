"""The processes of a job and what they tell each other; a process alone leaves everything as it is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from saerl_cli.run import shards

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """All processes of a job, from the view of one of them. What one calls, all must call."""

    rank: int = 0
    world_size: int = 1

    def all_reduce(self, tensor: "Tensor") -> "Tensor":
        """Sum a tensor over all processes; the argument stays as it is."""
        if self.world_size == 1:
            return tensor
        from torch import distributed

        place = "cuda" if distributed.get_backend() == "nccl" else tensor.device  # NCCL sees GPUs alone
        summed = tensor.detach().to(place, copy=True)
        distributed.all_reduce(summed)
        return summed.to(tensor.device)

    def broadcast(self, value: T) -> T:
        """Return the first process's value, anything that can be pickled."""
        if self.world_size == 1:
            return value
        from torch import distributed

        box = [value]
        distributed.broadcast_object_list(box)
        return box[0]

    def broadcast_tensors(self, tensors: "Sequence[Tensor]") -> None:
        """Give every process the first one's numbers, in place."""
        if self.world_size == 1:
            return
        from torch import distributed

        for tensor in tensors:
            distributed.broadcast(tensor, 0)

    def barrier(self) -> None:
        """Wait until all processes have come here, taking part in their passes through split models."""
        if self.world_size == 1:
            return
        import torch
        from torch import distributed

        shards.barrier()
        distributed.barrier(device_ids=[torch.cuda.current_device()] if distributed.get_backend() == "nccl" else None)

    def map_batches(self, count: int, batch_size: int, work: Callable[[slice], T]) -> list[T]:
        """Call `work` for each batch of `count` items, in order: every process does its own, and all get all.

        A batch is the same whatever the number of processes, so that its numbers are too.
        """
        batches = [slice(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
        if self.world_size == 1:
            return [work(batch) for batch in batches]
        from torch import distributed

        own = {number: work(batches[number]) for number in range(self.rank, len(batches), self.world_size)}
        shards.barrier()
        parts: list[Any] = [None] * self.world_size
        distributed.all_gather_object(parts, own)
        found = {number: result for part in parts for number, result in part.items()}
        return [found[number] for number in range(len(batches))]


ONE_PROCESS = ProcessGroup()


def process_group() -> ProcessGroup:
    """Find the processes of this job, once Accelerate has introduced them."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return ONE_PROCESS
    return ProcessGroup(distributed.get_rank(), distributed.get_world_size())
