"""Rounders: weights and statistics in, codes out."""

from lowbit.rounding.autoround import AutoRound
from lowbit.rounding.block import BlockRounder
from lowbit.rounding.gptq import GPTAQ, GPTQ, Qronos
from lowbit.rounding.hqq import HQQ
from lowbit.rounding.omniquant import OmniQuant
from lowbit.rounding.rtn import RTN
from lowbit.rounding.statistics import (
    Statistics,
    asymmetric_error,
    quadratic_error,
    statistics_of,
)

Rounder = RTN | HQQ | GPTQ | BlockRounder  # GPTAQ and Qronos are GPTQs

__all__ = [
    "GPTAQ",
    "GPTQ",
    "HQQ",
    "RTN",
    "AutoRound",
    "BlockRounder",
    "OmniQuant",
    "Qronos",
    "Rounder",
    "Statistics",
    "asymmetric_error",
    "quadratic_error",
    "statistics_of",
]
