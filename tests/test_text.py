import pytest
import torch
from models import tiny_tokenizer

from lowbit.errors import InputError
from lowbit.evaluate.text import CALIBRATION_SHARE, manual_text, read_text, tokenize


def test_splits_are_two_ends_of_one_text():
    calibration, evaluation = manual_text("calibration"), manual_text("evaluation")
    whole = len(calibration) + len(evaluation)
    assert whole > 300_000
    assert len(calibration) == int(whole * CALIBRATION_SHARE)
    assert manual_text() == evaluation  # evaluation is the default, and the text never changes


def test_splits_hold_every_paragraph_of_the_manual_once():
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    found = [paragraphs(manual_text(split)) for split in ("calibration", "evaluation")]
    split = found[0][:-1] + found[1][1:]  # the cut may fall inside a paragraph
    assert len(split) == len(set(split))
    assert set(split) <= set(paragraphs(text))
    assert len(set(paragraphs(text))) - len(split) <= 2


def paragraphs(text):
    return [" ".join(p.split()) for p in text.split("\n\n") if p.strip()]


def test_unknown_split():
    with pytest.raises(InputError, match="split must be one of .*got 'train'"):
        manual_text("train")


def test_read_text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("Grüße\n", encoding="utf-8")
    assert read_text(file) == "Grüße\n"


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "does not exist"),
        (b"", "must hold text"),
        (b" \n ", "must hold text"),
        (b"\xff\xfe\x00", "must be UTF-8"),
    ],
)
def test_read_text_errors(tmp_path, content, message):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_text(file)


def test_tokenize():
    ids = tokenize(tiny_tokenizer(), "abc")
    assert ids.dtype == torch.int64 and ids.shape == (3,)
