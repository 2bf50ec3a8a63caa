"""peak_memory: of a stretch, not of the process."""

from pathlib import Path

import pytest
import torch

from lowbit.evaluate import memory
from lowbit.evaluate.memory import peak_memory

CPU, SIZE = torch.device("cpu"), 256 << 20


def test_a_peak_is_that_of_its_stretch():
    with peak_memory(CPU) as before:
        pass
    with peak_memory(CPU) as during:
        torch.ones(SIZE, dtype=torch.uint8)
    with peak_memory(CPU) as after:
        pass
    if None in (before.bytes, during.bytes, after.bytes):
        pytest.skip("this system does not let a process start its peak anew")
    assert SIZE <= during.bytes - before.bytes < 1.5 * SIZE
    assert after.bytes < during.bytes - SIZE // 2


def test_what_cannot_be_started_anew_is_not_a_number(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CLEAR", Path(tmp_path, "no", "such", "file"))
    torch.ones(SIZE, dtype=torch.uint8)  # and released
    with peak_memory(CPU) as peak:
        pass
    assert peak.bytes is None


def test_a_request_that_does_nothing_is_seen(monkeypatch, tmp_path):
    """Where the system takes it and keeps the old peak."""
    monkeypatch.setattr(memory, "CLEAR", Path(tmp_path, "taken"))
    torch.ones(SIZE, dtype=torch.uint8)  # and released
    with peak_memory(CPU) as peak:
        pass
    assert peak.bytes is None
