"""Invertible maps on a space: how each is fitted, fused in fp64, or kept online."""

from lowbit.transforms.fuse import FittedTransforms, FoldNorms, fit, hook_online, rotate
from lowbit.transforms.online import OnlineTransform
from lowbit.transforms.rotation import Rotate, Rotation

__all__ = [
    "FittedTransforms",
    "FoldNorms",
    "OnlineTransform",
    "Rotate",
    "Rotation",
    "fit",
    "hook_online",
    "rotate",
]
