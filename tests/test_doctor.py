import json

import pytest

from lowbit import cuda, doctor
from lowbit.ops.dispatch import BACKENDS, OPS


@pytest.fixture(scope="module")
def report():
    return doctor.report()


def test_every_op_says_which_backend_runs_and_why_not(report):
    assert set(report["ops"]) == set(OPS)
    for name, backends in report["ops"].items():
        assert tuple(backends) == BACKENDS, name
        assert backends["reference"] is None
        assert all(reason is None or reason.strip() for reason in backends.values())


def test_reasons_that_need_the_call_are_said_to(monkeypatch):
    class Needy:
        name = "needy"
        backends = {"cuda": type("B", (), {"why_not": staticmethod(lambda x: "x is on cpu")})}

    reasons = doctor._reasons(Needy)
    assert reasons["cuda"] == doctor.PER_CALL
    assert reasons["triton"] == "no triton backend for needy"


def test_cuda_is_available_or_says_why_not(report):
    assert (report["cuda"]["why_not"] is None) == bool(report["cuda"]["devices"])


def test_missing_packages_are_none(report):
    assert all(report["packages"].values())
    assert doctor.installed_version("no-such-distribution") is None


def test_text_holds_what_json_holds(report):
    json.dumps(report, allow_nan=False)
    text = doctor.text(report)
    for name in (*report["ops"], *report["packages"], *report["optional"], report["python"]):
        assert name in text


def test_library_is_not_built(monkeypatch, tmp_path):
    missing = tmp_path / "_cuda.so"
    monkeypatch.setattr(cuda, "LIBRARY", cuda.Library(missing, "lowbit_cuda", "cuda"))
    monkeypatch.setattr(cuda, "BUILT", missing)
    found = doctor.report(kernels=True)
    assert found["library"]["why_not"] == cuda.NOT_BUILT
    assert found["library"]["architectures"] == found["kernels"] == []
    text = doctor.text(found)
    assert f"kernels: {cuda.NOT_BUILT}" in text and "Kernels: none" in text


class Launch:
    """In place of lowbit._launch: three kernels, one of another architecture."""

    @staticmethod
    def kernels():
        return [
            {"op": "int_gemm", "name": name, "threads": 128, "smem_bytes": 49152}
            | {"min_sm": sm[0], "max_sm": sm[1]}
            for name, sm in {"64x128": (80, 89), "128x128": (90, 90), "gemv": (80, 120)}.items()
        ]

    @staticmethod
    def attributes(i, device):
        if i == 2:
            raise RuntimeError("no kernel image is available")
        return dict.fromkeys(("registers", "local_bytes", "blocks_per_sm"), 10 + i)


@pytest.fixture
def launch(monkeypatch):
    monkeypatch.setattr(cuda, "launch", lambda: Launch)
    monkeypatch.setattr(cuda, "why_not_loaded", lambda: None)
    monkeypatch.setattr(cuda, "architectures", lambda: ("80", "90a"))


def lines_of(report) -> dict[str, list[str]]:
    """The words of each kernel's line."""
    lines = [line.split() for line in doctor.text(report).splitlines()]
    return {words[1]: words[2:] for words in lines if words[:1] == ["int_gemm"] and "x" in words[1]}


def test_kernels_without_a_gpu(launch, monkeypatch):
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    report = doctor.report(kernels=True)
    json.dumps(report)
    assert "kernels: built for sm_80, sm_90a" in doctor.text(report)
    assert lines_of(report)["64x128"] == ["80-89", "128", "49152", "not", "measured"]
    assert "kernels" not in doctor.report()


def test_kernels_on_a_gpu(launch, monkeypatch):
    gpus = {"why_not": None, "built_for": "13.0", "driver": None, "nvcc": None, "devices": []}
    monkeypatch.setattr(doctor, "_cuda", lambda: gpus)
    monkeypatch.setattr(doctor, "OPS", {})
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "sm", lambda: 90)
    report = doctor.report(kernels=True)
    lines = lines_of(report)
    assert lines["64x128"] == ["80-89", "128", "49152", "not", "for", "sm_90"]
    assert lines["128x128"] == ["90-90", "128", "49152", "11", "11", "11"]
    assert report["kernels"][2]["why_not"] == "no kernel image is available"
