"""Writing so that nothing is lost: beside the target first, then renamed into place."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from lowbit.errors import InputError

CONFIG_FILE = "config.json"  # what makes a folder a model folder


def write_whole(target: Path, write: Callable[[Path], object]):
    """A file, by write(path): it is whole at `target`, or what was there before is."""
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    write(beside)
    os.replace(beside, target)


def check_target(path: str | Path, overwrite: bool = False) -> Path:
    """`path`, absolute, if a model folder may be written there; an InputError if not."""
    target = Path(path).expanduser().resolve()
    if not target.exists():
        return target
    if not overwrite:
        raise InputError(f"output folder {str(path)!r} exists: pass --overwrite (overwrite=True)")
    # Overwriting deletes: only a folder that this or a like program has written.
    is_model = (target / CONFIG_FILE).is_file()
    if not target.is_dir() or not (is_model or not any(target.iterdir())):
        raise InputError(
            f"only a model folder can be overwritten: expected a {CONFIG_FILE} in {str(path)!r}, "
            "got none"
        )
    return target


@contextlib.contextmanager
def written_beside(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A new folder to write into; it takes the name `path` when the block ends without an error.

    After an error nothing of it stays and what was at `path` is as it was.
    """
    target = check_target(path, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = _hidden_neighbour(target)
    beside.mkdir()
    try:
        yield beside
        check_target(target, overwrite)  # writing takes a while: somebody may have been faster
        _replace(target, beside)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _replace(target: Path, beside: Path):
    if not target.exists():
        beside.rename(target)
        return
    aside = _hidden_neighbour(target)
    target.rename(aside)
    try:
        beside.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside)


def _hidden_neighbour(target: Path) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
