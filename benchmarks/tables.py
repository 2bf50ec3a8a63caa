"""From what benchmarks/tune.py measured to the tables of kernels/triton/tiles.py.

The rule. An entry of a table is for the shapes that reach it, and keeps what it is for. Of the
tiles that were timed at every measured one of those shapes, the one with the least geometric mean
of median times takes the entry where it is over TIE faster than the entry's own; else the entry
stays. Of equals the first in order of its fields wins. An entry whose own tile was refused (it does
not compile, or is wrong) goes to the fastest. A shape that was measured twice counts as it was
measured last: only times that took turns compare. An entry of no measured shape stays as it is.
"""

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

from lowbit.errors import InputError
from lowbit.kernels import tiles
from lowbit.kernels.tiles import ANY, FILES, limit_names, tile_names

TIE = 0.02  # of the time: what two runs of one tile differ by

Sizes = tuple[int, ...]  # of a tile, or of a shape, in the order of the fields


@dataclass(frozen=True)
class Result:
    """One line of a sweep's output: tiles that took turns at one shape.

    entry   index in the table
    us      median of each tile, infinite where it was refused
    """

    table: str
    entry: int
    shape: str
    dtype: str
    device: str
    date: str
    commit: str
    us: dict[Sizes, float]


def text_of(entry) -> str:
    """An entry's limits and sizes, as a line for people."""
    names = (*limit_names(type(entry)), *tile_names(type(entry)))
    return " ".join(f"{name}={_cell(getattr(entry, name))}" for name in names)


def sizes_of(entry) -> Sizes:
    return tuple(getattr(entry, name) for name in tile_names(type(entry)))


def tile_of(entry) -> dict[str, int]:
    return dict(zip(tile_names(type(entry)), sizes_of(entry), strict=True))


def entry_for(table: tuple, sizes: dict[str, float]) -> int:
    """Index of the entry that a launcher takes; `sizes` by what follows max_ in the limits."""
    for i, entry in enumerate(table):
        if all(value <= getattr(entry, f"max_{name}") for name, value in sizes.items()):
            return i
    raise InputError(f"no entry is for {sizes}")


def result_of(line: dict, tables: dict[str, tuple]) -> Result:
    """A line of a sweep, checked against the tables as they are."""
    name = line["table"]
    if name not in tables:
        raise InputError(f"table must be among {', '.join(tables)}, got {name!r}")
    table = tables[name]
    kind = type(table[0])
    limits = [limit.removeprefix("max_") for limit in limit_names(kind)]
    if sorted(line["sizes"]) != sorted(limits):
        raise InputError(f"sizes must be {', '.join(limits)}, got {', '.join(line['sizes'])}")
    index = entry_for(table, line["sizes"])
    us = {}
    for timed in line["tiles"]:
        tile = timed["tile"]
        if sorted(tile) != sorted(tile_names(kind)):
            raise InputError(f"a tile must have {', '.join(tile_names(kind))}, got {tile}")
        entry = replace(table[index], **tile)
        tiles.check(name, [*table[:index], entry, *table[index + 1 :]])
        us[sizes_of(entry)] = timed["us"]["p50"] if "us" in timed else math.inf
        if not us[sizes_of(entry)] > 0:
            raise InputError(f"a time must be positive, got {timed['us']['p50']}")
    about = {key: line[key] for key in ("shape", "dtype", "device", "date", "commit")}
    return Result(name, index, us=us, **about)


def read_results(path: Path, tables: dict[str, tuple]) -> Iterator[Result]:
    """The lines of a file, but one that a killed run left unfinished at its end."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            return
        try:
            yield result_of(json.loads(line), tables)
        except KeyError as error:
            raise InputError(f"{path}:{number}: no {error}") from error
        except (ValueError, TypeError, AttributeError) as error:  # InputError and JSON's are one
            raise InputError(f"{path}:{number}: {error}") from error


def rewritten(
    tables: dict[str, tuple], results: Iterable[Result], without: Iterable[dict[str, int]] = ()
) -> tuple[dict[str, tuple], list[str]]:
    """The tables by the rule above, and a line for people about every measured entry.

    without     sizes: a tile that has all those of one of them is none, as for one that
                tests/test_compile.py cannot compile for another GPU
    """
    latest: dict[tuple, Result] = {}
    for r in results:
        latest.pop((r.table, r.entry, r.shape, r.dtype), None)  # the order is that of measuring
        latest[r.table, r.entry, r.shape, r.dtype] = r
    devices = {r.device for r in latest.values()}
    if len(devices) > 1:
        raise InputError(f"results must be of one device, got {', '.join(sorted(devices))}")
    of_entry: dict[tuple[str, int], list[Result]] = {}
    for (name, index, *_), result in latest.items():
        of_entry.setdefault((name, index), []).append(result)
    new, lines = {name: list(table) for name, table in tables.items()}, []
    for (name, index), group in sorted(of_entry.items()):
        entry = tables[name][index]
        new[name][index], text = _taken(entry, group, list(without))
        lines.append(f"{name} {text}")
    for name, table in new.items():
        tiles.check(name, table)
    return {name: tuple(table) for name, table in new.items()}, lines


def _taken(entry, group: list[Result], without: list[dict[str, int]]):
    """The entry with the tile that the rule gives it, and what is said about it."""
    names = tile_names(type(entry))

    def is_out(sizes: Sizes) -> bool:
        tile = dict(zip(names, sizes, strict=True))
        return any(all(tile.get(k) == v for k, v in out.items()) for out in without)

    own = sizes_of(entry)
    everywhere = set.intersection(*(set(r.us) for r in group))
    if own not in everywhere:
        raise InputError(f"not compared with the table's own {text_of(entry)}: measure again")
    mean_us = {
        sizes: math.inf
        if is_out(sizes)
        else math.exp(sum(math.log(r.us[sizes]) for r in group) / len(group))
        for sizes in everywhere
    }
    best = min(mean_us, key=lambda sizes: (mean_us[sizes], sizes))
    if mean_us[best] == math.inf:
        return entry, f"{text_of(entry)}: kept, no tile is right"
    kept = mean_us[best] >= (1 - TIE) * mean_us[own]
    shapes = f"{len(group)} shape" + ("s" if len(group) > 1 else "")
    last = group[-1]
    measured = f"{last.device} {last.date} {last.commit} {shapes}"
    tile = dict(zip(names, own if kept else best, strict=True))
    taken = replace(entry, **tile, measured=measured)
    ratio = mean_us[own] / mean_us[best]
    verb = "kept, the fastest is" if kept else "replaced, the new one is"
    faster = f"{verb} {ratio:.2f}x" if ratio < math.inf else "replaced, the old one was refused"
    return taken, f"{text_of(taken)}: {faster} ({shapes}, {len(mean_us)} tiles)"


def _cell(value) -> str:
    return "any" if value == ANY else str(value)


def csv_text(kind: type, tables: dict[str, tuple]) -> str:
    """The file of all tables of one kind, in their order."""
    columns = [field.name for field in fields(kind)]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["table", *columns])
    for name, table in tables.items():
        if isinstance(table[0], kind):
            writer.writerows([name, *(_cell(getattr(t, c)) for c in columns)] for t in table)
    return file.getvalue()


def write(folder: Path, tables: dict[str, tuple]) -> list[Path]:
    """The files that change. Each is whole, the old or the new one, whenever a run is killed."""
    changed = []
    for file_name, kind in FILES.items():
        path, text = folder / file_name, csv_text(kind, tables)
        if path.read_text(encoding="utf-8") == text:
            continue
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
        changed.append(path)
    return changed
