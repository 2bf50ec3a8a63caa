"""Triton kernels, one file per op; installed as lowbit.kernels."""
