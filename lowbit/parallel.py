"""Calibration by several processes, each with a share of the windows: what they tell each other.

torchrun starts the processes and `start` joins them. Each has the whole model; window i is that of
process i % size. What is summed over windows is summed over processes too, by the functions below,
and what follows from a sum is done by all alike. So all come to the same weights, which differ from
those of one process by the order of additions.

In one process each function gives back what it is given. Nothing else in lowbit asks which process
it is, but for the command line and what loads a share of a model (lowbit/tensor_parallel.py). A
failure ends the others too: torchrun stops them, and without it a process that waits for one that
has gone raises, by gloo at once, by NCCL when its patience ends.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lowbit.errors import InputError

T = TypeVar("T")
PATIENCE = timedelta(hours=1)  # with a process that is behind, as when it reads a model
_rank, _size = 0, 1


def start(device: torch.device):
    """Join the processes that torchrun started, if it did. On CUDA each takes the device of its
    local rank; what is summed may lie there or on the CPU."""
    global _rank, _size
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    backend = "gloo"
    if device.type == "cuda":
        local, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if device.index is not None:
            raise InputError(
                f"device must be 'cuda' for each process to take its own, got {str(device)!r}"
            )
        if local >= devices:
            raise InputError(
                f"processes on a machine must be at most its CUDA devices, got {devices} for "
                f"local rank {local}"
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=PATIENCE)
    _rank, _size = dist.get_rank(), dist.get_world_size()


def finish():
    """Leave the others, who may go on."""
    global _rank, _size
    if _size > 1:
        dist.destroy_process_group()
    _rank, _size = 0, 1


def rank() -> int:
    return _rank


def check_windows(count: int):
    """Refuse fewer windows than processes."""
    if count < _size:
        raise InputError(
            f"calibration windows must be at least as many as processes, got {count} for {_size}"
        )


def own() -> slice:
    """This process's, of whatever there is one of for each window."""
    return slice(_rank, None, _size)


def among_own(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Which of these window numbers are this process's, bool, and where those are among its own."""
    mine = windows % _size == _rank
    return mine, windows[mine] // _size


def sum_(tensor: Tensor) -> Tensor:
    """Over processes, in place."""
    if _size > 1:
        dist.all_reduce(tensor)
    return tensor


def max_(tensor: Tensor) -> Tensor:
    """Over processes, in place; NaN may get lost."""
    if _size > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def total(number: float) -> float:
    """Over processes, summed in fp64."""
    return sum_(torch.tensor(float(number), dtype=torch.float64)).item()


def gradient(leaf: Tensor) -> Tensor | None:
    """leaf.grad summed over processes, in place: zeros of those that had no sample."""
    if _size == 1:
        return leaf.grad
    if leaf.grad is None:
        leaf.grad = torch.zeros_like(leaf)
    return sum_(leaf.grad)


def first(do: Callable[[], T]) -> T:
    """What `do` returns in the first process, where alone it runs: what has to do with the disk.

    The others wait for it. What it raises, all raise.
    """
    if _size == 1:
        return do()
    told = [None, None]
    if _rank == 0:
        try:
            told[0] = do()
        except Exception as error:  # of any kind: the others wait
            told[1] = error
    dist.broadcast_object_list(told, device=torch.device("cpu"))
    if told[1] is not None:
        raise told[1]
    return told[0]


def by_first(do: Callable[..., None]) -> Callable[..., None]:
    """`do` in the first process, nothing in the others; nobody waits."""
    return do if _rank == 0 else lambda *args, **kwargs: None
