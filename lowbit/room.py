"""Whether a model fits on its devices, known before anything of it is loaded."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from lowbit.errors import InputError
from lowbit.tensors import named_tensors

MEMINFO = Path("/proc/meminfo")
AVAILABLE = "MemAvailable:"  # man 5 proc: what new programs can have without swapping, in kB


def free_bytes(device: torch.device) -> int | None:
    """What may still be allocated there; None where nobody says."""
    if device.type == "cuda" and torch.cuda.is_available():
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept  # which torch has and nothing uses
    if device.type == "cpu" and MEMINFO.is_file():
        for line in MEMINFO.read_text().splitlines():
            if line.startswith(AVAILABLE):
                return int(line.split()[1]) * 1024
    return None


def tensor_bytes(model: PreTrainedModel) -> dict[str, int]:
    """name -> bytes of what a checkpoint holds; a model on the meta device has them too."""
    return {name: tensor.nbytes for name, tensor in named_tensors(model).items()}


def check_placement(model: PreTrainedModel, device_map: dict):
    """Room for every tensor on the device that `device_map` names for it: module -> device."""
    needed: dict[torch.device, int] = {}
    for name, size in tensor_bytes(model).items():
        parents = [m for m in device_map if m == "" or name == m or name.startswith(f"{m}.")]
        if parents:
            device = torch.device(device_map[max(parents, key=len)])
            needed[device] = needed.get(device, 0) + size
    for device, size in needed.items():
        check_room(size, free_bytes(device), f"on {device}")


def check_room(needed: int, free: int | None, where: str):
    if free is not None and needed > free:
        raise InputError(
            f"the model needs {readable(needed)} {where}, {readable(needed - free)} more than the "
            f"{readable(free)} that are free there"
        )


def readable(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
