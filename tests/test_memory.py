"""peak_memory: of a stretch, not of the process."""

import mmap
from pathlib import Path

import pytest
import torch

from lowbit.evaluate import memory
from lowbit.evaluate.memory import peak_memory

CPU, SIZE = torch.device("cpu"), 256 << 20


def test_a_peak_is_that_of_its_stretch():
    """Pages of their own: after other tests a tensor may lie where freed ones did."""
    with peak_memory(CPU) as before:
        pass
    if before.bytes is None:
        pytest.skip("this system does not let a process start its peak anew")
    with peak_memory(CPU) as during, mmap.mmap(-1, SIZE) as pages:
        for _ in range(256):
            pages.write(bytes(SIZE // 256))
    with peak_memory(CPU) as after:
        pass
    assert 0.9 * SIZE < during.bytes - before.bytes < 1.5 * SIZE
    assert after.bytes < during.bytes - SIZE // 2


def test_what_cannot_be_started_anew_is_not_a_number(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CLEAR", Path(tmp_path, "no", "such", "file"))
    with peak_memory(CPU) as peak:
        pass
    assert peak.bytes is None
