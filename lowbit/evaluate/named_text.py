"""Texts by name: `manual`, a file, and the three that the published perplexities are of.

    wikitext2   WikiText-2 raw, test split: 4358 rows, joined by a blank line
    ptb         Penn Treebank, test split: 3761 sentences, joined by a space ("ptb-new")
    c4          C4, the first 1100 documents of the first of eight validation files, joined by a
                space; the first 256 windows ("c4-new")

as GPTQ's code joins them (Frantar et al. 2023, arXiv 2210.17323), and after it the tables of
lowbit/data. Each is read from texts_folder(), from the hub's cache, or from the hub, in this order.
"""

import difflib
import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import huggingface_hub
from torch import Tensor

from lowbit.errors import InputError
from lowbit.evaluate.text import manual_text, read_text, tokenize
from lowbit.models.source import cache_folder

MANUAL = "the Python manual"  # pydoc_data.topics
MANUAL_WORD = "manual"  # which stands for it among files


@dataclass(frozen=True)
class Text:
    """windows: only the first so many are evaluated; None: all."""

    name: str
    text: str
    windows: int | None = None

    def tokens(self, tokenizer, window: int) -> Tensor:
        """Token ids [n], no more than its windows of `window` tokens hold."""
        tokens = tokenize(tokenizer, self.text)
        return tokens if self.windows is None else tokens[: self.windows * window]


@dataclass(frozen=True)
class Published:
    """Where a text comes from, and how its rows become one.

    local       its file as its authors distribute it
    repository, revision, file   of the hub; a Parquet file may lie beside `local` as NAME.parquet
    column      of a row that holds the text
    of_line     a line of `local` as the hub has it as a row, where that is plain text
    rows        how many are taken; `exactly`: and there are no more, else it is another file
    """

    local: str
    repository: str
    file: str
    column: str
    join: str
    rows: int
    exactly: bool = True
    windows: int | None = None
    revision: str = "main"
    of_line: Callable[[str], str] | None = None


PUBLISHED = {
    "wikitext2": Published(
        local="wiki.test.raw",
        repository="Salesforce/wikitext",
        file="wikitext-2-raw-v1/test-00000-of-00001.parquet",
        column="text",
        join="\n\n",
        rows=4358,
        of_line=lambda line: line if line.strip() else "",  # with the newline at its end
    ),
    "ptb": Published(
        local="ptb.test.txt",
        repository="ptb-text-only/ptb_text_only",
        file="penn_treebank/test/0000.parquet",
        revision="refs/convert/parquet",
        column="sentence",
        join=" ",
        rows=3761,
        of_line=str.strip,
    ),
    "c4": Published(
        local="c4-validation.00000-of-00008.json.gz",
        repository="allenai/c4",
        file="en/c4-validation.00000-of-00008.json.gz",
        column="text",
        join=" ",
        rows=1100,
        exactly=False,
        windows=256,
    ),
}
TEXTS_HELP = f"{', '.join(PUBLISHED)}, {MANUAL_WORD} (the Python manual), or a UTF-8 file"


def open_text(name: str) -> Text:
    """The text that `name` stands for; one that is not to be had is an InputError."""
    if name == MANUAL_WORD:
        return Text(MANUAL, manual_text("evaluation"))
    if name in PUBLISHED:
        return _published(name, PUBLISHED[name])
    near = difflib.get_close_matches(name, [MANUAL_WORD, *PUBLISHED], 1, 0.7)
    if near and not Path(name).expanduser().exists():
        raise InputError(f"text file {name!r} does not exist; did you mean {near[0]!r}?")
    return Text(Path(name).name, read_text(name))


def stand_ins(words: Sequence[str]) -> dict[str, Text]:
    """The files, each NAME=FILE, that are read in place of published texts."""
    found = {}
    for word in words:
        name, is_pair, path = word.partition("=")
        if not is_pair or name not in PUBLISHED:
            raise InputError(
                f"a text of a published table must be NAME=FILE, of {', '.join(PUBLISHED)}, "
                f"got {word!r}"
            )
        found[name] = Text(Path(path).name, read_text(path), PUBLISHED[name].windows)
    return found


def texts_folder() -> Path:
    """Where files of the published texts may lie: $XDG_CACHE_HOME/lowbit/texts."""
    return cache_folder() / "texts"


def _published(name: str, spec: Published) -> Text:
    path = _find(name, spec)
    try:
        rows = list(islice(_rows(path, spec), spec.rows + spec.exactly))
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise InputError(f"text {name!r}: {path} cannot be read: {error!r}") from error
    if len(rows) != spec.rows:
        more = "more" if len(rows) > spec.rows else len(rows)
        raise InputError(
            f"text {name!r}: {path} must hold {spec.rows} rows, got {more}: is it {spec.local}?"
        )
    return Text(name, spec.join.join(rows), spec.windows)


def _find(name: str, spec: Published) -> Path:
    local = [texts_folder() / spec.local, texts_folder() / f"{name}.parquet"]
    local = local[:1] if spec.of_line is None else local
    for path in local:
        if path.is_file():
            return path
    try:
        found = huggingface_hub.hf_hub_download(
            spec.repository, spec.file, repo_type="dataset", revision=spec.revision
        )
    except (OSError, ValueError) as error:  # both of the hub's own and of the network's
        reason = " ".join(str(error).split())[:120]
        parquet = f", or {spec.file} of {spec.repository} as {local[1].name}," if local[1:] else ""
        raise InputError(
            f"text {name!r} is not here, and the hub does not give it ({reason}): "
            f"put {spec.local}{parquet} into {texts_folder()}"
        ) from error
    return Path(found)


def _rows(path: Path, spec: Published) -> Iterator[str]:
    if path.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError:
            raise InputError(
                f"{path} needs the package pyarrow, which is not installed: "
                "pip install 'lowbit[eval]'"
            ) from None
        yield from parquet.read_table(path, columns=[spec.column])[spec.column].to_pylist()
    elif spec.of_line is None:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            yield from (json.loads(line)[spec.column] for line in lines)
    else:
        with path.open(encoding="utf-8") as lines:
            yield from map(spec.of_line, lines)
