"""Checkpoints: a Hugging Face model folder whose linears are codes, scales and zero points.

    config.json             the model's configuration and, under quantization_config, LowbitConfig
    model.safetensors       every tensor of the state dict, packed ones in the canonical layout
                            (docs/formats.md); above max_shard_bytes in parts with an index
    README.md               the model card
    generation_config.json, tokenizer files

Saved and loaded bit for bit. Loading builds the model on the meta device, swaps its modules there
and assigns the tensors one by one: the full-precision model never exists. transformers'
from_pretrained does the same with check_tensors and finish (lowbit/integrations/transformers.py).
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import DeviceMesh
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lowbit import interop
from lowbit.config import QUANT_METHOD, LowbitConfig
from lowbit.errors import InputError
from lowbit.files import CONFIG_FILE, written_beside
from lowbit.integrations import attach
from lowbit.model_card import write_card
from lowbit.models import adapter_of
from lowbit.models.source import LOAD_ERRORS
from lowbit.nn.attention import QUANTIZED
from lowbit.nn.decode import DECODE_ROWS, set_decode
from lowbit.nn.fused import fuse
from lowbit.nn.linear import QuantLinear
from lowbit.nn.swap import check_prefill_kv, set_backend, set_prefill_kv, swap
from lowbit.ops.dispatch import BACKENDS
from lowbit.room import check_placement
from lowbit.tensor_parallel import become_share, check_whole, group_of, parts_of
from lowbit.tensors import (
    INDEX_FILE,
    WEIGHTS_FILE,
    assign,
    lookup,
    named_tensors,
    open_tensors,
    read_json,
    read_tensors,
    restore_rotary,
    tensor_files,
)

GENERATION_FILE = "generation_config.json"
QUANTIZATION_KEY = "quantization_config"
MAX_SHARD_BYTES = 5 * 10**9
SAFETENSORS_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
}


def save(
    model: PreTrainedModel,
    path: str | Path,
    tokenizer=None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
):
    """Write a packed model, and its tokenizer if given, to the folder `path`.

    An existing folder is refused unless `overwrite`; a failed run leaves it whole.
    """
    config = getattr(model, "lowbit_config", None)
    if config is None:
        raise InputError(f"save needs a model quantized by lowbit, got {type(model).__name__}")
    check_whole(model, "save")
    if config.format.weight and not any(isinstance(m, QuantLinear) for m in model.modules()):
        raise InputError("save needs a packed model, got its fake-quantized simulation")
    check_tokenizer(model, tokenizer)
    with written_beside(path, overwrite) as folder:
        write(model, config.to_dict(), named_tensors(model), folder, tokenizer, max_shard_bytes)
        write_card(folder, model)


def check_tokenizer(model: PreTrainedModel, tokenizer):
    """Every id of a tokenizer, or of None, has a row in the embedding."""
    highest = -1 if tokenizer is None else max(tokenizer.get_vocab().values(), default=-1)
    rows = model.get_input_embeddings().num_embeddings
    if highest >= rows:
        raise InputError(
            f"the tokenizer must have token ids in 0 .. {rows - 1}, the rows of the model's "
            f"embedding, got ids up to {highest}: is it the model's own?"
        )


def write(
    model: PreTrainedModel,
    quantization: dict,
    tensors: dict[str, Tensor],
    folder: Path,
    tokenizer=None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
):
    """The files of a model folder, into an empty one: `tensors` under a quantization_config."""
    config = {**_config_dict(model), QUANTIZATION_KEY: quantization}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    _write_tensors(tensors, folder, max_shard_bytes)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def load(
    path: str | Path,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    fused: bool = True,
    prefill_kv: str = QUANTIZED,
    decode: str | None = None,
    decode_rows: int | None = None,
    tensor_parallel: bool | DeviceMesh = False,
) -> PreTrainedModel:
    """A packed model from the folder `path`, in eval mode, frozen.

    Of what other tools have quantized, what docs/interop.md says is read as it is.

    backend  of all its ops; None: the first that can run each call
    dtype    of embeddings, norms, biases and activations; None: as saved
    device   None: cpu
    fused    decoder layers in as few ops as there are (lowbit/nn/fused.py), where the architecture
             and the format have them; False: modules of transformers' names in their places
    prefill_kv  what a prompt's tokens see of each other: "quantized", what the cache holds of
             them, or "full", K and V in the model's dtype (lowbit/nn/attention.py)
    decode   "w4a16" for 4-bit weights whose inputs are quantized, and so on: linears take up to
             decode_rows rows, such as those of a decoding step, as they are, and multiply them by
             the same weights (lowbit/nn/decode.py); None: every row is quantized
    decode_rows  None: DECODE_ROWS of that file, 8, which is not measured: on a GPU the largest M at
             which `lowbit bench weight_only_gemm` finds it the faster
    tensor_parallel  True: the processes that torchrun started share the model out, or those of a
             mesh; each reads and holds its share (lowbit/tensor_parallel.py)
    """
    if decode is None and decode_rows is not None:
        raise InputError(f"decode_rows needs decode, such as 'w4a16', got {decode_rows} alone")
    if backend not in (None, *BACKENDS):
        raise InputError(f"backend must be one of {BACKENDS}, got {backend!r}")
    check_prefill_kv(prefill_kv)
    folder = Path(path).expanduser()
    config = read_config(folder)
    quantization = config.pop(QUANTIZATION_KEY)
    model, saved_dtype = _build(folder, config, dtype)
    adapter = adapter_of(model)
    if quantization.get("quant_method") == QUANT_METHOD:
        where = f"checkpoint {str(folder)!r}: {QUANTIZATION_KEY}"
        lowbit_config, files = parse_quantization(where, quantization), tensor_files(folder)
        translated = None
        headers = headers_of(files)
    else:
        lowbit_config, translated = interop.translate(folder, quantization, model, adapter)
        headers = {name: (tuple(t.shape), t.dtype) for name, t in translated.items()}
    swap(model, adapter, lowbit_config)

    check_tensors(folder, headers, model, saved_dtype)
    group, parts = group_of(tensor_parallel, torch.device(device or "cpu")), {}
    if group is not None:
        parts = parts_of(model, adapter, group.rank(), group.size())
        for name, part in parts.items():
            assign(model, name, lookup(model, name)[part])
    check_placement(model, {"": device or "cpu"})
    if translated is None:
        tensors = read_tensors(files, parts)
    else:
        tensors = ((name, t[parts.get(name, ...)]) for name, t in translated.items())
    for name, tensor in tensors:
        expected = lookup(model, name)
        # A copy: aligned memory that does not depend on the file staying as it is.
        assign(model, name, tensor.to(device=device or "cpu", dtype=expected.dtype, copy=True))
    if group is not None:
        become_share(model, adapter, group)
    if model.config.tie_word_embeddings:
        model.tie_weights()
    restore_rotary(model, adapter.rotary_path, device or "cpu")
    if (folder / GENERATION_FILE).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    set_prefill_kv(model, prefill_kv)
    rows = DECODE_ROWS if decode_rows is None else decode_rows
    return finish(model, backend, fused, decode, rows)


def finish(
    model: PreTrainedModel,
    backend: str | None = None,
    fused: bool = True,
    decode: str | None = None,
    decode_rows: int = DECODE_ROWS,
) -> PreTrainedModel:
    """The last steps of loading, once every tensor is in its place."""
    set_backend(model, backend)  # and lay the weights out for it and the device
    set_decode(model, decode, decode_rows)
    if fused:
        fuse(model)
    return attach(model.eval().requires_grad_(False))


def read_config(folder: Path) -> dict:
    """config.json of a lowbit checkpoint, as a dictionary."""
    if not folder.is_dir():
        raise InputError(f"checkpoint folder {str(folder)!r} does not exist")
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise InputError(f"checkpoint {str(folder)!r} must hold a {CONFIG_FILE}, got none")
    config = read_json(file)
    if not isinstance(config.get(QUANTIZATION_KEY), dict):
        raise InputError(
            f"{file} must hold a {QUANTIZATION_KEY} written by lowbit, got none: "
            "quantize the model first"
        )
    return config


def parse_quantization(where: str, d: dict) -> LowbitConfig:
    """What quantization_config says; `where` it stands begins the message of what is wrong."""
    try:
        return LowbitConfig.from_dict(d)
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{where}: {error}") from None


def _config_dict(model: PreTrainedModel) -> dict:
    config = model.config.to_dict()
    for name in ("_name_or_path", QUANTIZATION_KEY):  # where the source lay; below, at the end
        config.pop(name, None)
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    return config


def _build(
    folder: Path, config: dict, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, torch.dtype]:
    """The full-precision model on the meta device (no memory), and the dtype it was saved in."""
    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise InputError(f"checkpoint {str(folder)!r}: unknown architecture {kind!r}")
    try:
        parsed = CONFIG_MAPPING[kind].from_dict(config)
        saved = parsed.dtype or torch.float32
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(parsed, dtype=dtype or saved)
    except LOAD_ERRORS as error:
        reason = " ".join(str(error).split())
        raise InputError(f"checkpoint {str(folder)!r}: invalid {CONFIG_FILE}: {reason}") from error
    return model, saved


def _write_tensors(tensors: dict[str, Tensor], folder: Path, max_shard_bytes: int):
    shards: list[dict[str, Tensor]] = [{}]
    room = max_shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        room -= tensor.nbytes
        shards[-1][name] = tensor.contiguous()
    n = len(shards)
    files = [WEIGHTS_FILE]
    if n > 1:
        files = [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": {
                name: file for file, shard in zip(files, shards, strict=True) for name in shard
            },
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / CONFIG_FILE, folder / file)  # safetensors leaves it private


Headers = dict[str, tuple[tuple[int, ...], torch.dtype | str]]  # name -> shape and dtype


def headers_of(files: list[Path]) -> Headers:
    """Of every tensor in the files; a dtype without a name here is safetensors' word."""
    headers = {}
    for file in files:
        with open_tensors(file) as handle:
            for name in handle.keys():
                part = handle.get_slice(name)
                stored = SAFETENSORS_DTYPES.get(part.get_dtype(), part.get_dtype())
                headers[name] = tuple(part.get_shape()), stored
    return headers


def check_tensors(
    folder: Path, headers: Headers, model: PreTrainedModel, saved_dtype: torch.dtype | None = None
):
    """Every tensor there, none besides, all of the right shape and dtype.

    saved_dtype  of the model when it was saved; None: that of its embedding
    """
    expected = named_tensors(model)
    if saved_dtype is None:
        embedding = model.get_input_embeddings()
        names = [f"{name}.weight" for name, module in model.named_modules() if module is embedding]
        saved_dtype = next((headers[name][1] for name in names if name in headers), None)
    for name, (shape, stored) in headers.items():
        if name not in expected:
            raise InputError(f"checkpoint {str(folder)!r}: unexpected tensor {name}")
        want = expected[name]
        if shape != tuple(want.shape):
            raise InputError(
                f"checkpoint {str(folder)!r}: {name} must have shape {tuple(want.shape)}, "
                f"got {shape}"
            )
        # Codes and scales keep their dtype; what has the model's dtype may be converted.
        if stored != want.dtype and (stored, want.dtype) != (saved_dtype, model.dtype):
            raise InputError(
                f"checkpoint {str(folder)!r}: {name} must be {want.dtype}, got {stored}"
            )
    missing = sorted(expected.keys() - headers.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"checkpoint {str(folder)!r}: missing tensor {missing[0]}{more}")
