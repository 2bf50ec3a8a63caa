"""Named tensors: read from safetensors files, assigned to the modules of a model."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.errors import InputError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def read_json(file: Path) -> dict:
    """The JSON object in a file; anything else is an InputError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} must be JSON, got {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file} must be a JSON object, got {type(content).__name__}")
    return content


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder; each of them exists."""
    if not (folder / INDEX_FILE).is_file():
        files = [folder / WEIGHTS_FILE]
    else:
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict):
            raise InputError(f"{folder / INDEX_FILE} must hold a weight_map, got none")
        # .name: a part lies in this folder, whatever the index says
        files = [folder / Path(str(file)).name for file in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise InputError(f"checkpoint file {str(file)!r} does not exist")
    return files


def open_tensors(file: Path):
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise InputError(f"{file} must be a whole safetensors file, got {error}") from None


Parts = dict[str, tuple[slice, ...]]  # name -> what of a tensor; of others all


def read_tensors(files: list[Path], parts: Parts | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the files, or the part of it; no more than that is read."""
    for file in files:
        with open_tensors(file) as handle:
            for name in handle.keys():
                if parts and name in parts:
                    yield name, handle.get_slice(name)[parts[name]]
                else:
                    yield name, handle.get_tensor(name)


def named_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a checkpoint holds: the state dict without an output head that is the embedding."""
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        head = model.get_output_embeddings()
        for name, module in model.named_modules():
            if module is head:
                tensors.pop(f"{name}.weight", None)
    return tensors


def lookup(model: nn.Module, name: str) -> Tensor:
    parent, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(parent), leaf)


def assign(model: nn.Module, name: str, tensor: Tensor):
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def restore_rotary(model: PreTrainedModel, path: str, device: str | torch.device):
    """Rotary frequencies are not saved: they follow from the configuration."""
    parent, _, leaf = path.rpartition(".")
    rotary = type(model.get_submodule(path))(model.config)
    setattr(model.get_submodule(parent), leaf, rotary.to(device))
