"""Recipe: a published method as data."""

from dataclasses import dataclass, field

from lowbit.formats import QuantFormat
from lowbit.rounding import GPTQ, RTN
from lowbit.transforms import FoldNorms, Rotate


@dataclass(frozen=True)
class Calibration:
    """Random windows of a text: `samples` of `length` tokens each."""

    samples: int = 128
    length: int = 2048


@dataclass(frozen=True)
class Recipe:
    """Transforms in order, a rounder for the weights, clip ratios of the dynamic quantizers.

    The clips map a bit width to a ratio; widths not named keep the whole range (1.0).
    """

    name: str
    summary: str
    source: str
    rounder: RTN | GPTQ
    transforms: tuple[FoldNorms | Rotate, ...] = ()
    activation_clip: dict[int, float] = field(default_factory=dict)
    kv_clip: dict[int, float] = field(default_factory=dict)
    calibration: Calibration = Calibration()

    def clips(self, format: QuantFormat) -> tuple[float, float]:
        """(activation clip, KV clip) for a format."""
        bits = [None if f is None else f.bits for f in (format.activation, format.kv)]
        return self.activation_clip.get(bits[0], 1.0), self.kv_clip.get(bits[1], 1.0)
