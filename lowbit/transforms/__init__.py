"""Invertible maps on a space: how each is fitted, fused in fp64, or kept online."""

from lowbit.transforms.fuse import FittedTransforms, FoldNorms, fit, rotate
from lowbit.transforms.learned import LearnedRotation, LearnRotation
from lowbit.transforms.maps import LearnMap, Map
from lowbit.transforms.online import OnlineTransform
from lowbit.transforms.rotation import Rotate, Rotation
from lowbit.transforms.scale import AWQ, Ones, OutlierSuppressionPlus, Scale, SmoothQuant

__all__ = [
    "AWQ",
    "FittedTransforms",
    "FoldNorms",
    "LearnMap",
    "LearnRotation",
    "LearnedRotation",
    "Map",
    "Ones",
    "OnlineTransform",
    "OutlierSuppressionPlus",
    "Rotate",
    "Rotation",
    "Scale",
    "SmoothQuant",
    "fit",
    "rotate",
]
