"""CayleySGD: gradient descent over orthogonal matrices.

For an orthogonal X with gradient G, A = G X^T - X G^T is skew, and

    X <- (I + t/2 A)^-1 (I - t/2 A) X

is orthogonal again for every t (Wen and Yin 2013; Li, Fuxin and Todorovic 2020, arXiv 2002.01113,
algorithm 1, whose fixed-point iteration is a linear solve here). With t = min(lr, 1 / |A|) no step
turns any plane by more than about half a radian, so that lr may be as large as SpinQuant's 1.5.
"""

import torch
from torch import Tensor

from lowbit.errors import InputError


class CayleySGD(torch.optim.Optimizer):
    """Parameters are orthogonal matrices [..., n, n], fp32; no momentum.

    Rounding is kept from adding up: every `orthogonal_every` steps the nearest orthogonal matrix
    takes a parameter's place.
    """

    def __init__(self, params, lr: float, orthogonal_every: int = 20):
        if not lr > 0:
            raise InputError(f"lr must be positive, got {lr}")
        super().__init__(params, {"lr": lr})
        self.orthogonal_every, self.steps = orthogonal_every, 0

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.steps += 1
        for group in self.param_groups:
            for x in group["params"]:
                if x.grad is None:
                    continue
                x.copy_(cayley_step(x, x.grad, group["lr"]))
                if self.steps % self.orthogonal_every == 0:
                    x.copy_(nearest_orthogonal(x.double()))
        return loss


def cayley_step(x: Tensor, gradient: Tensor, lr: float) -> Tensor:
    """x [..., n, n] moved along minus its gradient, orthogonal if x is."""
    skew = gradient @ x.mT
    skew = skew - skew.mT
    size = torch.linalg.matrix_norm(skew, 1, keepdim=True)
    step = (1 / (size + 1e-8)).clamp(max=lr) / 2
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return torch.linalg.solve(eye + step * skew, x - step * skew @ x)


def cayley(x: Tensor) -> Tensor:
    """The rotation (I + S)^-1 (I - S), S = x - x^T, of any x [..., n, n]; of 0 it is I."""
    skew = x - x.mT
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return torch.linalg.solve(eye + skew, eye - skew)


def nearest_orthogonal(x: Tensor) -> Tensor:
    """The orthogonal factor of the polar decomposition of x [..., n, n]."""
    u, _, vh = torch.linalg.svd(x)
    return u @ vh
