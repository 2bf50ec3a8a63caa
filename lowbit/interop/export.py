"""export: a packed model as a checkpoint of another tool, the same codes, scales and zero points.

What the format cannot say is an InputError, and nothing is written.
"""

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from lowbit.checkpoint import write
from lowbit.errors import InputError
from lowbit.files import written_beside
from lowbit.interop import compressed_tensors, ct_transforms, gptq
from lowbit.models import adapter_for
from lowbit.nn.fused import packed_linears
from lowbit.tensor_parallel import check_whole
from lowbit.tensors import named_tensors

WRITERS = {module.METHOD: module for module in (gptq, compressed_tensors)}


def export(
    model: PreTrainedModel, path: str | Path, to: str, tokenizer=None, overwrite: bool = False
):
    """Write a packed model, and its tokenizer if given, to the folder `path` in the format `to`.

    An existing folder is refused unless `overwrite`; a failed run leaves it whole.
    """
    if to not in WRITERS:
        raise InputError(f"format to export must be one of {sorted(WRITERS)}, got {to!r}")
    config = getattr(model, "lowbit_config", None)
    if config is None:
        raise InputError(f"export needs a model quantized by lowbit, got {type(model).__name__}")
    check_whole(model, "export")
    try:
        if config.format.head is not None:
            raise InputError(f"its output head is not quantized, got {config.format}")
        quantization = WRITERS[to].quantization_config(config, model.dtype)
        tensors = _tensors(model, to)
    except InputError as error:
        raise InputError(f"cannot export to {to}: {error}") from None
    with written_beside(path, overwrite) as folder:
        write(model, quantization, tensors, folder, tokenizer)


def _tensors(model: PreTrainedModel, to: str) -> dict[str, Tensor]:
    tensors = named_tensors(model)
    for path, module in packed_linears(model):
        for leaf in [name for name in module.state_dict() if name != "bias"]:
            del tensors[f"{path}.{leaf}"]
        written = WRITERS[to].linear_tensors(module, model.dtype, path)
        tensors |= {f"{path}.{leaf}": tensor for leaf, tensor in written.items()}
    if to == compressed_tensors.METHOD:
        first = f"{adapter_for(model.config).block_path}.0"
        tensors |= ct_transforms.stored_of(model.lowbit_config.input_transforms, first)
    return tensors
