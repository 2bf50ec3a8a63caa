"""The quantizer of transformers for quant_method "lowbit".

AutoModelForCausalLM.from_pretrained builds the model on the meta device, lets the quantizer replace
its modules there and reads the tensors by their names, each to its device: the full-precision model
never exists. The modules, the checks and the last steps are those of lowbit.load
(lowbit/checkpoint.py).

Only what transformers 5.17 and 5.23 have in common is overridden.
"""

import re
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit import checkpoint
from lowbit.config import QUANT_METHOD, LowbitConfig
from lowbit.errors import InputError
from lowbit.integrations.hub import PackedModel, packed_class
from lowbit.models import Adapter, adapter_for, adapter_of
from lowbit.nn.swap import swap
from lowbit.room import check_placement, check_room, free_bytes, tensor_bytes
from lowbit.tensor_parallel import become_share, check_whole, parts_of
from lowbit.tensors import assign, named_tensors

NOT_ACCELERATORS = ("cpu", "disk")


class LowbitQuantizationConfig(QuantizationConfigMixin):
    """A LowbitConfig as transformers wants to have it: made of keywords, written by to_dict."""

    def __init__(self, **fields):
        self.quant_method = QUANT_METHOD
        self.lowbit = checkpoint.parse_quantization("quantization_config", fields)

    @classmethod
    def of(cls, config: LowbitConfig) -> "LowbitQuantizationConfig":
        made = cls.__new__(cls)
        made.quant_method, made.lowbit = QUANT_METHOD, config
        return made

    def to_dict(self) -> dict:
        return self.lowbit.to_dict()

    def __iter__(self):
        yield from self.to_dict().items()


class LowbitQuantizer(HfQuantizer):
    """Reads and saves packed models; it does not quantize: lowbit.quantize does."""

    def __init__(self, quantization_config: LowbitQuantizationConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise InputError(
                "from_pretrained reads models that are quantized already, got one in full "
                "precision and a quantization_config: use lowbit.quantize"
            )
        self.needed = 0  # bytes of the model that is being loaded

    def validate_environment(self, *_args, device_map=None, **_unused):
        """Called before the model is made, and with the map that an "auto" has come to."""
        places = set(device_map.values()) if isinstance(device_map, dict) else set()
        accelerators = places.difference(NOT_ACCELERATORS, (torch.device("cpu"),))
        if "disk" in places or (accelerators and accelerators != places):
            raise InputError(
                "packed layers stay on their device and are not offloaded, got a device_map that "
                f"leaves modules on {sorted(map(str, places - accelerators))}: give the model more "
                "or larger devices, or all of it to the CPU"
            )

    def adjust_max_memory(self, max_memory: dict) -> dict:
        """Called for device_map="auto" and its like, before a device is chosen."""
        accelerators = {d: size for d, size in max_memory.items() if d not in NOT_ACCELERATORS}
        if accelerators:
            where = f"on {', '.join(map(str, accelerators))}"
            check_room(self.needed, sum(accelerators.values()), where)
        elif "cpu" in max_memory:
            check_room(self.needed, max_memory["cpu"], "on cpu")
        return max_memory

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, device_map=None, checkpoint_files=None, **_unused
    ):
        if model.base_model is model:
            raise InputError(
                "a lowbit checkpoint holds a causal language model: read it by "
                f"AutoModelForCausalLM, got {type(model).__name__}"
            )
        adapter = adapter_of(model)
        swap(model, adapter, self.quantization_config.lowbit)
        if checkpoint_files:
            files = [Path(file) for file in checkpoint_files]
            checkpoint.check_tensors(files[0].parent, checkpoint.headers_of(files), model)
        self.needed = sum(tensor_bytes(model).values())
        ranks = getattr(getattr(model.config, "distributed_config", None), "tp_size", None) or 1
        if ranks > 1:
            (device,) = (device_map or {"": "cpu"}).values()  # each rank has one
            self._plan_shares(model, adapter, ranks, torch.device(device))
        elif not isinstance(device_map, str):
            check_placement(model, device_map or {"": "cpu"})

    def _plan_shares(
        self, model: PreTrainedModel, adapter: Adapter, ranks: int, device: torch.device
    ):
        """Tell transformers what a rank reads of each tensor; not what a module does with its part,
        which it knows."""
        parts = parts_of(model, adapter, 0, ranks)
        styles = {1: "colwise", 2: "rowwise"}  # by the dimension that is cut, the last of a part
        model._tp_plan = {
            re.sub(r"\.\d+\.", ".*.", name): styles[len(part)] for name, part in parts.items()
        }
        sizes = tensor_bytes(model).items()
        needed = sum(size // ranks if name in parts else size for name, size in sizes)
        check_room(needed, free_bytes(device), f"on {device}")

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_unused):
        parts = [(n, p) for n, p in model.named_parameters() if isinstance(p, DTensor)]
        for name, tensor in parts:
            assign(model, name, tensor.to_local())
        if parts:
            mesh = parts[0][1].device_mesh
            become_share(model, adapter_for(model.config), mesh.get_group(mesh.ndim - 1))
        return checkpoint.finish(model)

    def update_weight_conversions(self, _conversions, *_unused) -> list:
        """None: a checkpoint has the names of the modules as they are."""
        return []

    def get_state_dict_and_metadata(self, model: PreTrainedModel):
        check_whole(model, "save_pretrained")
        return named_tensors(model), {}

    def is_serializable(self, **_unused) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def register():
    """As transformers has it for methods that it does not ship; a second call does nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(LowbitQuantizationConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(LowbitQuantizer)


def attach(model: PreTrainedModel):
    """What from_pretrained leaves on a quantized model, so that save_pretrained and others see one
    wherever it comes from."""
    config = LowbitQuantizationConfig.of(model.lowbit_config)
    model.hf_quantizer = LowbitQuantizer(config)
    model.quantization_method, model.is_quantized = QUANT_METHOD, True
    model.config.quantization_config = config
    model._weight_conversions = []  # save_pretrained: the names are the modules', see above
    if not isinstance(model, PackedModel):
        model.__class__ = packed_class(type(model))


def detach(model: PreTrainedModel):
    for name in ("hf_quantizer", "quantization_method", "is_quantized", "_weight_conversions"):
        model.__dict__.pop(name, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if isinstance(model, PackedModel):
        model.__class__ = model.plain
