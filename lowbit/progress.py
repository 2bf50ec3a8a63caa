"""Progress of a long fit, in a file: saved as it goes, taken up again after a kill."""

import hashlib
import os
import pickle
from pathlib import Path

import torch
from torch import Tensor

from lowbit.errors import InputError


class Progress:
    """path  of the file; None: nothing is saved and nothing found
    of    what the fit is of, by name: a file that is of another is refused, not overwritten
    """

    def __init__(self, path: str | Path | None, of: dict[str, str]):
        self.path = None if path is None else Path(path).expanduser()
        self.of = of

    def load(self) -> dict | None:
        """The state that was saved last; None where there is no file."""
        if self.path is None or not self.path.exists():
            return None
        try:
            found = torch.load(self.path, weights_only=True)
            of, state = found["of"], found["state"]
        except (OSError, RuntimeError, KeyError, TypeError, EOFError, pickle.PickleError) as error:
            raise InputError(f"resume: {str(self.path)!r} holds no saved fit: {error}") from error
        differs = [f"{name} {of.get(name)}" for name in self.of if of.get(name) != self.of[name]]
        if differs:
            raise InputError(
                f"resume: the fit saved in {str(self.path)!r} is another: {', '.join(differs)}; "
                f"expected {', '.join(f'{k} {v}' for k, v in self.of.items())}"
            )
        return state

    def save(self, state: dict):
        """Whole or not at all: written beside, then renamed."""
        if self.path is None:
            return
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"of": self.of, "state": state}, beside)
        os.replace(beside, self.path)


def fingerprint(*tensors: Tensor) -> str:
    """Of dtypes, shapes and bits."""
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(f"{t.dtype}{tuple(t.shape)}".encode())
        digest.update(t.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
