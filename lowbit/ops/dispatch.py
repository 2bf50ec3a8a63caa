"""One dispatcher for every op: contract check, choice of backend with reasons, torch.library.

`backend=None` takes the first backend that can run the call; a named backend runs or raises, it
never falls back; if none can, the error lists each reason.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

BACKENDS = ("cuda", "triton", "reference")  # in order of preference
NAMESPACE = "lowbit"
TRITON_CAPABILITY = (8, 0)
_CONSTANT = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}
OPS: dict[str, "Op"] = {}  # every op by its torch.library name, filled as lowbit.ops is imported


class NoBackendError(RuntimeError):
    """No backend, or not the one asked for, can run a call; the message lists the reasons."""


@dataclass(frozen=True)
class Backend:
    """`why_not(*args)` is None when the backend can run the call, else the reason it cannot."""

    why_not: Callable[..., str | None]
    target: str | None = None  # "module:function", imported at first use

    def load(self) -> Callable:
        module, function = self.target.split(":")
        return getattr(importlib.import_module(module), function)


@dataclass(frozen=True)
class Op:
    """One op: its `reference` is its meaning and its signature is the schema.

    check      (*args) -> None; raises ValueError from shapes and dtypes alone, never reads data
    reference  (*args) -> tensors, plain PyTorch, any device
    fake       (*args) -> empty tensors of the shapes, dtypes and device the op returns
    """

    name: str
    check: Callable[..., None]
    reference: Callable
    fake: Callable
    backends: dict[str, Backend] = field(default_factory=dict)
    mutates_args: tuple[str, ...] = ()

    def __post_init__(self):
        schema = torch.library.infer_schema(self.reference, mutates_args=self.mutates_args)
        arguments, returns = schema.split(") -> ")
        qualified = f"{NAMESPACE}::{self.name}"
        torch.library.define(qualified, f"{arguments}, *, str? backend=None) -> {returns}")
        torch.library.impl(qualified, "default", self._run)
        torch.library.register_fake(qualified, self._fake)
        OPS[self.name] = self

    def __call__(self, *args, backend: str | None = None):
        return getattr(torch.ops.lowbit, self.name)(*args, backend=backend)

    def reasons(self, *args) -> dict[str, str | None]:
        """backend -> why it cannot run this call, None for one that can, in order of preference."""
        return {name: self._why_not(name, args) for name in BACKENDS if self._has(name)}

    def _has(self, name: str) -> bool:
        return name == "reference" or name in self.backends

    def _why_not(self, name: str, args: tuple) -> str | None:
        return None if name == "reference" else self.backends[name].why_not(*args)

    def _run(self, *args, backend: str | None = None):
        self.check(*args)
        if backend is not None and backend not in BACKENDS:
            raise ValueError(f"{self.name}: backend must be one of {BACKENDS}, got {backend!r}")
        for name in BACKENDS:  # those after the one that runs are not asked
            if backend in (None, name) and self._has(name) and self._why_not(name, args) is None:
                run = self.reference if name == "reference" else self.backends[name].load()
                try:
                    return run(*args)
                except RuntimeError as error:
                    # All that torch's stable ABI says of an allocation that fails.
                    if "aten::new_empty" not in str(error):
                        raise
                    message = f"CUDA out of memory. {self.name} found no room for what it makes"
                    raise torch.OutOfMemoryError(message) from error
        asked = (
            "no backend can" if backend is None else f"backend {backend!r} was asked for and cannot"
        )
        reasons = self.reasons(*args).items()
        listed = "\n".join(f"  {name}: {reason}" for name, reason in reasons if reason)
        raise NoBackendError(f"{self.name}: {asked} run this call\n{listed}")

    def _fake(self, *args, backend: str | None = None):
        # Bits, orders and clips that a trace made symbolic are constants of a call; sizes are not.
        args = [_CONSTANT[type(a)](a) if type(a) in _CONSTANT else a for a in args]
        self.check(*args)
        return self.fake(*args)


def why_not_triton(*tensors: Tensor | None) -> str | None:
    """What every Triton kernel needs: Triton, and tensors on one GPU of sm_80 or later.

    Under Triton's interpreter (TRITON_INTERPRET=1, for tests) the tensors are on the CPU. Without
    tensors, the answer is about the machine.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        return f"the tensors are on several devices: {', '.join(sorted(map(str, devices)))}"
    if interpreted():
        return None if not devices or devices == {torch.device("cpu")} else "it is interpreted"
    if devices and next(iter(devices)).type != "cuda":
        return f"the tensors are on {next(iter(devices))}"
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability(*devices)
    if capability < TRITON_CAPABILITY:
        return f"it needs sm_80 or later, this is sm_{capability[0]}{capability[1]}"
    return None


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter."""
    from triton import knobs

    return knobs.runtime.interpret
