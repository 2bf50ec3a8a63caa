import json

import pytest

from lowbit import doctor
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
