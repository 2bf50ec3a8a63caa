"""Rounders: weights and statistics in, codes out."""

from lowbit.rounding.gptq import GPTAQ, GPTQ, Qronos
from lowbit.rounding.hqq import HQQ
from lowbit.rounding.rtn import RTN
from lowbit.rounding.statistics import (
    Statistics,
    asymmetric_error,
    quadratic_error,
    statistics_of,
)

Rounder = RTN | HQQ | GPTQ  # GPTAQ and Qronos are GPTQs

__all__ = [
    "GPTAQ",
    "GPTQ",
    "HQQ",
    "RTN",
    "Qronos",
    "Rounder",
    "Statistics",
    "asymmetric_error",
    "quadratic_error",
    "statistics_of",
]
