"""LowbitConfig: all a packed model needs to know besides its tensors; saved in config.json."""

from dataclasses import dataclass, field, fields

from lowbit.errors import InputError
from lowbit.formats import QuantFormat
from lowbit.transforms.online import OnlineTransform

QUANT_METHOD = "lowbit"
# Of the checkpoint: tensor names, canonical layout, this dictionary and what its rotations are.
# Version 1 split Hadamard orders otherwise: its weights do not fit the rotations of this one.
# Version 2 had no clips of single modules: it is read as it was written.
VERSION, OLDEST_VERSION = 3, 2
OF_THE_CHECKPOINT = {"quant_method", "version", "layout"}  # what to_dict adds to the fields


@dataclass(frozen=True)
class LowbitConfig:
    """How a quantized model runs.

    activation_clip, kv_clip  clip ratios of the dynamic quantizers, in (0, 1]
    clips                     those of single modules, linear's or attention's full name -> ratio
    input_transforms          linear's name inside its block -> rotation of its input before it is
                              quantized, e.g. "mlp.down_proj"
    query_key_transform       rotation of q and k after RoPE; None: none
    centred                   the mean is out of the residual stream: LayerNorms are RMSNorms
    tensor_parallel           ranks that may share the model out: inputs of the linears that read
                              heads or MLP channels have a scale for the slice of each
    report                    what was done and measured while quantizing; never read back
    """

    format: QuantFormat
    recipe: str
    activation_clip: float = 1.0
    kv_clip: float = 1.0
    clips: dict[str, float] = field(default_factory=dict)
    input_transforms: dict[str, OnlineTransform] = field(default_factory=dict)
    query_key_transform: OnlineTransform | None = None
    centred: bool = False
    tensor_parallel: int = 1
    report: dict = field(default_factory=dict)

    def to_dict(self) -> dict:
        """JSON-able, under the keys transformers reads first (quant_method)."""
        query_key = self.query_key_transform
        ranks = {"tensor_parallel": self.tensor_parallel} if self.tensor_parallel > 1 else {}
        return {
            "quant_method": QUANT_METHOD,
            "version": VERSION,
            "layout": "row_major",
            "format": self.format.name,
            "recipe": self.recipe,
            "activation_clip": self.activation_clip,
            "kv_clip": self.kv_clip,
            "clips": self.clips,
            "input_transforms": {k: t.to_dict() for k, t in self.input_transforms.items()},
            "query_key_transform": query_key and query_key.to_dict(),
            "centred": self.centred,
            **ranks,  # where it is 1, earlier releases read the checkpoint too
            "report": self.report,
        }

    @classmethod
    def from_dict(cls, d: dict) -> "LowbitConfig":
        """Inverse of to_dict; another method or a newer version is an InputError."""
        if d.get("quant_method") != QUANT_METHOD:
            raise InputError(
                f"quant_method must be {QUANT_METHOD!r}, got {d.get('quant_method')!r}"
            )
        if not isinstance(d.get("version"), int) or d["version"] > VERSION:
            raise InputError(
                f"checkpoint version must be at most {VERSION}, got {d.get('version')!r}: "
                "update lowbit to read it"
            )
        if d["version"] < OLDEST_VERSION:
            raise InputError(
                f"checkpoint version must be at least {OLDEST_VERSION}, got {d['version']}: "
                "its Hadamard rotations are others, quantize the model again"
            )
        unknown = sorted(set(d) - OF_THE_CHECKPOINT - {f.name for f in fields(cls)})
        if unknown:
            raise InputError(f"unknown {unknown}: what it stands for would be left out")
        missing = {"format", "recipe", "activation_clip", "kv_clip", "input_transforms"} - set(d)
        if missing:
            raise InputError(f"must hold {sorted(missing)}, got {sorted(d)}")
        clips = d.get("clips", {})
        if not isinstance(clips, dict) or not all(map(_is_clip, clips.values())):
            raise InputError(f"clips must be numbers in (0, 1] by module, got {clips}")
        ranks = d.get("tensor_parallel", 1)
        if type(ranks) is not int or ranks < 1:
            raise InputError(f"tensor_parallel must be an integer of at least 1, got {ranks!r}")
        query_key = d.get("query_key_transform")
        return cls(
            format=QuantFormat.parse(d["format"]),
            recipe=d["recipe"],
            activation_clip=d["activation_clip"],
            kv_clip=d["kv_clip"],
            clips=clips,
            input_transforms={k: OnlineTransform(**t) for k, t in d["input_transforms"].items()},
            query_key_transform=query_key and OnlineTransform(**query_key),
            centred=d.get("centred", False),  # None had LayerNorms before it was written
            tensor_parallel=ranks,
            report=d.get("report", {}),
        )


def _is_clip(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
