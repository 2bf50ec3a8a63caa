"""Rounders: weights and statistics in, codes out."""

from lowbit.rounding.gptq import GPTQ, quadratic_error
from lowbit.rounding.rtn import RTN

__all__ = ["GPTQ", "RTN", "quadratic_error"]
