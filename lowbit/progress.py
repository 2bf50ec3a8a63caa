"""Progress of a long fit, in a folder: saved as it goes, taken up again after a kill.

    fit.json        what the fit is of: the folder is refused to any other
    training.pt     rotations, while they are learned end to end
    learned.pt      rotations that were learned, and the report of it
    block-0000.pt   a block that is done, and each after it (lowbit/finished.py)

Each file is whole or not there: it is written beside, then renamed. The first process reads and
writes; it tells the others. As many processes as before come to the same bits, others to the same
but for the order of additions.
"""

import hashlib
import json
import pickle
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from lowbit import parallel
from lowbit.errors import InputError
from lowbit.files import write_whole

FIT_FILE = "fit.json"


class Progress:
    """folder  None: nothing is saved and nothing found. It is made when something is saved
    of      what the fit is of, by name

    Raises InputError where the folder is of another fit, before anything in it changes.
    """

    def __init__(self, folder: str | Path | None, of: dict[str, str]):
        self.folder = None if folder is None else Path(folder).expanduser()
        self.of = of
        if self.folder is not None:
            parallel.first(self._check)

    def load(self, name: str) -> dict | None:
        """The state that was saved last under this name, on the CPU; None where there is none."""
        if self.folder is None:
            return None
        return parallel.first(lambda: self._read(name))

    def save(self, name: str, state: dict):
        """state  tensors, numbers, strings and None, in dicts and lists"""
        if self.folder is not None:
            parallel.first(lambda: self._write(name, state))

    def _read(self, name: str) -> dict | None:
        if not self._file(name).exists():
            return None
        try:
            return torch.load(self._file(name), weights_only=True, map_location="cpu")
        except (OSError, RuntimeError, KeyError, EOFError, pickle.PickleError) as error:
            raise InputError(
                f"resume: {str(self._file(name))!r} holds no saved fit: {error}"
            ) from error

    def _write(self, name: str, state: dict):
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / FIT_FILE).exists():
            text = json.dumps(self.of, indent=2) + "\n"
            write_whole(self.folder / FIT_FILE, lambda file: file.write_text(text))
        write_whole(self._file(name), lambda file: torch.save(state, file))

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.pt"

    def _check(self):
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"resume must be a folder, got the file {str(self.folder)!r}")
        file = self.folder / FIT_FILE
        if not file.exists():
            if any(self.folder.glob("*.pt")):  # of what fit?
                raise InputError(
                    f"resume: {str(self.folder)!r} must hold a {FIT_FILE} beside what was saved, "
                    "got none"
                )
            return
        try:
            found = dict(json.loads(file.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"resume: {str(file)!r} holds no saved fit: {error}") from error
        differs = [
            f"{name} {found.get(name)} instead of {self.of.get(name)}"
            for name in self.of | found
            if found.get(name) != self.of.get(name)
        ]
        if differs:
            raise InputError(
                f"resume: the fit saved in {str(self.folder)!r} is another, of "
                f"{', '.join(differs)}: take another folder, or delete this one"
            )


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Of dtypes, shapes and bits."""
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(f"{t.dtype}{tuple(t.shape)}".encode())
        digest.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
