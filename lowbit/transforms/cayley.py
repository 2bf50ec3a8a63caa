"""CayleySGD: gradient descent over orthogonal matrices.

For an orthogonal X with gradient G, A = X^T G - G^T X is skew, and

    X <- X (I + t/2 A)^-1 (I - t/2 A)

is orthogonal again for every t (Wen and Yin 2013; Li, Fuxin and Todorovic 2020, arXiv 2002.01113,
algorithm 1, whose fixed-point iteration is a linear solve here). With t = min(lr / 2, 1 / |A|) no
step turns any plane by more than half a radian, so that lr may be as large as SpinQuant's 1.5; it
is halved since SpinQuant's code has A / 2 in A's place. |A| is the 1-norm, and not that of
X A X^T = G X^T - X G^T, which gives the same X: there, in the basis before the rotation, the
channel of an outlier has a column several times as long, and steps would be as much shorter.
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
    skew = x.mT @ gradient
    skew = skew - skew.mT
    size = torch.linalg.matrix_norm(skew, 1, keepdim=True)
    step = (1 / (size + 1e-8)).clamp(max=lr / 2) / 2
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return x @ torch.linalg.solve(eye + step * skew, eye - step * skew)


def cayley(x: Tensor) -> Tensor:
    """The rotation (I + S)^-1 (I - S), S = x - x^T, of any x [..., n, n]; of 0 it is I."""
    skew = x - x.mT
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return torch.linalg.solve(eye + skew, eye - skew)


def nearest_orthogonal(x: Tensor) -> Tensor:
    """The orthogonal factor of the polar decomposition of x [..., n, n]."""
    u, _, vh = torch.linalg.svd(x)
    return u @ vh
