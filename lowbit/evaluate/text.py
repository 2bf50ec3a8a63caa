"""Text to calibrate and to evaluate on: the manual that every Python carries, or a file."""

import re
from pathlib import Path

from torch import Tensor

from lowbit.errors import InputError

SPLITS = ("calibration", "evaluation")
CALIBRATION_SHARE = 0.6  # of the manual's characters; the rest is for evaluation


def manual_text(split: str = "evaluation") -> str:
    """The Python manual's topics (pydoc_data.topics), sorted by name, each paragraph once.

    About 373,000 characters. A fifth of the manual stands in more than one topic: without dropping
    what came before, much of the evaluation text would have been calibrated on. Topics change a
    little from one Python to the next, so a perplexity on them is comparable only within one.
    """
    if split not in SPLITS:
        raise InputError(f"split must be one of {SPLITS}, got {split!r}")
    from pydoc_data.topics import topics  # 700 KB that most imports of lowbit do not need

    text = "\n\n".join(topics[name] for name in sorted(topics))
    unique = {}
    for paragraph in re.split(r"\n\s*\n", text):
        unique.setdefault(" ".join(paragraph.split()), paragraph)
    text = "\n\n".join(unique.values())
    cut = int(len(text) * CALIBRATION_SHARE)
    return text[:cut] if split == "calibration" else text[cut:]


def read_text(path: str | Path) -> str:
    """A UTF-8 file's text; an empty, missing or binary one is an InputError."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"text file {str(path)!r} does not exist")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"text file {str(path)!r} must be UTF-8, got {error}") from None
    if not text.strip():
        raise InputError(f"text file {str(path)!r} must hold text, got an empty file")
    return text


def tokenize(tokenizer, text: str) -> Tensor:
    """Token ids [n] of the whole text, with the special tokens the tokenizer adds by itself."""
    # verbose=False: a text longer than the model's context is what evaluation expects
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]


def check_token_ids(tokens: Tensor, vocabulary: int, name: str):
    """Refuse ids that a model of this vocabulary cannot embed: another model's tokenizer."""
    if tokens.numel() == 0:
        return
    lowest, highest = tokens.min().item(), tokens.max().item()
    if lowest < 0 or highest >= vocabulary:
        raise InputError(
            f"{name}: token ids must be in 0 .. {vocabulary - 1}, the model's vocabulary, got "
            f"{lowest} .. {highest}: is the tokenizer the model's own?"
        )
