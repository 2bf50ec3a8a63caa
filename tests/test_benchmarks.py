"""benchmarks/: what is counted, what is refused, what a row says, and `lowbit bench` on a CPU."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import clock, machine, methods_table, report
from benchmarks.harness import Case, checked, contract_bytes, gate, run_case
from benchmarks.machine import Roof
from benchmarks.run import cases_of, op_stems
from benchmarks.shapes import MODELS, Setup
from lowbit import cli, commands, hadamard
from lowbit.errors import InputError
from lowbit.ops.dispatch import NoBackendError
from lowbit.ops.hadamard import HADAMARD

CPU = torch.device("cpu")
ROOF = Roof(copy_gbs=100.0, matmul_tops={"bf16": 1.0, "int8": 2.0})


@pytest.fixture
def quick(monkeypatch):
    """Few repeats on little memory: the code path, not the number."""
    monkeypatch.setattr(clock, "REPEATS", 2)
    monkeypatch.setattr(clock, "FEWEST_REPEATS", 2)
    monkeypatch.setattr(clock, "CPU_FLUSH_BYTES", 1 << 10)
    monkeypatch.setattr(machine, "COPY_BYTES", {"cpu": [1 << 16]})
    monkeypatch.setattr(machine, "MATMUL_SIZE", {"cpu": 32})


def cases(stem: str, *rows: int) -> list[Case]:
    return list(cases_of(stem, Setup(MODELS["tiny"], rows, (64,), CPU)))


def case(stem: str, M: int, dtype: str, variant: str = "") -> Case:
    return next(c for c in cases(stem, M) if (c.dtype, c.variant) == (dtype, variant))


# what is counted


@pytest.mark.parametrize("dtype,x_bits,groups", [("w4a8 bf16", 8, 1), ("w4a8 g128 bf16", 8, 2)])
def test_bytes_of_int_gemm(dtype, x_bits, groups):
    M, N, K = 3, 512, 256  # q, k and v of the tiny shapes
    c = case("int_gemm", M, dtype)
    assert c.shape == f"M={M} N={N} K={K} qkv"
    x, w, y = M * K * x_bits // 8, N * K // 2, 2 * M * N
    scales = 4 * M + (4 if groups == 1 else 2) * N * groups
    assert contract_bytes(c.op, c.arguments(False)) == x + w + y + scales
    assert c.operations == 2 * M * N * K


def test_a_packed_operand_counts_half():
    packed, plain = (case("int_gemm", 4, f"w4a4{p} bf16") for p in (" packed x", ""))
    saved = contract_bytes(plain.op, plain.arguments(False))
    saved -= contract_bytes(packed.op, packed.arguments(False))
    assert saved == 4 * 256 // 2


@pytest.mark.parametrize("stem", ["kv_append", "kv_attention"])
def test_bytes_of_whole_pages(stem):
    """Where the tokens fill their pages, the formula is what the tensors take."""
    for c in cases(stem, 64):
        assert c.nbytes == contract_bytes(c.op, c.arguments(False))


def test_operations_of_attention():
    decode, prefill = case("kv_attention", 2, "bf16 x kv4"), case("kv_attention", 128, "bf16 x kv4")
    heads = MODELS["tiny"].num_q_heads * MODELS["tiny"].head_dim
    assert decode.operations == 4 * heads * 2 * 64  # two sequences of 64 tokens
    assert prefill.operations == 4 * heads * 128 * 129 // 2  # half a square and half its diagonal


def test_roof_is_the_larger_time():
    assert ROOF.floor_us(10**6, 0, "bf16") == pytest.approx(10)
    assert ROOF.floor_us(10**6, 10**8, "bf16") == pytest.approx(100)
    assert ROOF.floor_us(10**6, 10**8, "int8") == pytest.approx(50)


def test_percentiles():
    assert clock.Timing.of([float(i) for i in range(11, 0, -1)]) == clock.Timing(2.0, 6.0, 10.0)


def test_the_gpu_script_runs_every_op():
    script = (Path(__file__).parents[1] / "benchmarks/gpu.sh").read_text()
    listed = re.search(r"^OPS=\$\{OPS:-(.*?)\}$", script, re.S | re.M)[1]
    assert sorted(listed.replace("\\\n", " ").split()) == sorted(op_stems())


# what is refused


@pytest.mark.parametrize("stem", op_stems())
def test_the_reference_passes_the_gate(stem):
    """And so every case can be made; that two runs of it agree says that its inputs repeat."""
    for c in cases(stem, 3):
        assert checked(c, "reference") is None, c


def broken(c: Case, spoil) -> Case:
    """The case with a backend "broken" whose arguments or outputs are spoiled."""

    def run(*args, backend):
        if backend == "reference":
            return c.call(args, backend)
        return spoil(args, lambda *a: c.call(a, "reference"))

    return replace(c, run=run)


def rolled(index: int):
    """One argument, rolled by a row: what a wrong index does."""
    return lambda args, call: call(*args[:index], args[index].roll(1, 0), *args[index + 1 :])


@pytest.mark.parametrize(
    "stem,dtype,index",
    [
        ("int_gemm", "w4a8 bf16", 4),  # w_scale
        ("weight_only_gemm", "w4a16g128-wasym bf16", 3),  # w_zero_point
        ("kv_attention", "bf16 x kv4", 4),  # v_codes
        ("kv_attention", "bf16 x kv4", 7),  # block_table
        ("kv_append", "bf16 -> kv4", 5),  # slot
        ("hadamard_quant", "bf16 -> int4", 0),  # x
    ],
)
def test_the_gate_refuses_a_wrong_index(stem, dtype, index):
    reason = gate(broken(case(stem, 3, dtype), rolled(index)), "broken")
    assert reason.startswith("wrong: ") and "differ" in reason


def test_the_gate_refuses_one_bit_and_unwritten_memory():
    c = case("hadamard", 3, "bf16")

    def one_bit(args, call):
        y = call(*args)
        y.view(torch.int16)[2, 5] ^= 1
        return y

    def unwritten(args, call):
        call(*args)  # its memory, with the right numbers in it, may be handed out again
        return torch.empty_like(args[0])

    def in_place(args, call):
        y = call(*args)
        args[0].zero_()
        return y

    assert "1 of 1152 elements of tensor 0 differ" in gate(broken(c, one_bit), "broken")
    assert gate(broken(c, unwritten), "broken").startswith("wrong: 1152 of")
    assert "elements of tensor 1 differ" in gate(broken(c, in_place), "broken")
    wide = broken(c, lambda args, call: call(*args).float())
    assert gate(wide, "broken").startswith("wrong: tensor 0 is torch.float32 (3, 384), not")
    twice = broken(c, lambda args, call: (call(*args),) * 2)
    assert gate(twice, "broken") == "wrong: 3 tensors, not 2"


def test_a_wrong_backend_is_not_timed(quick):
    c = broken(case("hadamard", 3, "bf16"), lambda args, call: -call(*args))
    wrong, right = run_case(c, ["broken", "reference"], clock.CpuClock(), ROOF)[:2]
    assert wrong.why_not.startswith("wrong: ") and wrong.cold_p50_us is None
    assert right.why_not == "" and right.cold_p50_us > 0
    assert "broken" in report.line(wrong) and "not timed: wrong" in report.line(wrong)


def test_what_a_backend_raises_is_a_reason():
    def raises(error):
        return broken(case("hadamard", 3, "bf16"), lambda *_: (_ for _ in ()).throw(error))

    assert checked(raises(RuntimeError("launch failed\nat 0")), "b") == (
        "wrong: RuntimeError: launch failed"
    )
    refused = NoBackendError("hadamard: no backend\n  triton: x is fp64")
    assert checked(raises(refused), "b") == "triton: x is fp64"


# rows


def test_rows_of_a_case(quick, tmp_path):
    rows = run_case(case("int_gemm", 16, "w8a8 bf16"), ["reference"], clock.CpuClock(), ROOF)
    assert [r.contender for r in rows] == [
        "reference",
        "torch bf16",
        "torch._int_mm",
        "torch._scaled_mm fp8",
    ]
    op, in_torch, int_mm, fp8 = rows
    assert op.floor_us == ROOF.floor_us(op.bytes, op.operations, "int8")
    assert op.gbs == pytest.approx(op.bytes / op.cold_p50_us / 1e3)
    assert op.vs_torch == pytest.approx(in_torch.cold_p50_us / op.cold_p50_us)
    assert in_torch.vs_torch == 1 and in_torch.gbs is None
    assert op.cold_p10_us <= op.cold_p50_us <= op.cold_p90_us and op.launch == "loop"
    assert "takes M > 16" in report.line(int_mm)
    assert "not timed: needs a CUDA device" in report.line(fp8)
    assert_round_trip(rows, tmp_path / "new" / "rows.csv")


def assert_round_trip(rows: list[report.Row], path):
    for _ in range(2):
        report.append_csv(path, rows)
    read = report.read_csv(path)
    assert len(path.read_text().splitlines()) == 2 * len(rows) + 1 and len(read) == 2 * len(rows)
    for got, row in zip(read, rows * 2, strict=True):
        for name in report.COLUMNS:
            value = getattr(row, name)
            rounded = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert getattr(got, name) == rounded, name


def test_another_csv_is_left_alone(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="must begin with the columns of a benchmark"):
        report.append_csv(path, [])
    assert path.read_text() == "a,b\n1,2\n"


def test_every_absent_peer_has_a_reason():
    for stem in op_stems():
        c = cases(stem, 3)[0]
        found = {name: make() for name, make in c.peers(*c.arguments(False)).items()}
        assert found and all(callable(p) or p for p in found.values()), stem
        assert next(iter(found)).startswith("torch"), stem  # the baseline


def test_a_peer_that_fails_is_a_reason(quick):
    def fails():
        raise AttributeError("no such function\nin this version")

    c = replace(case("hadamard", 3, "bf16"), peers=lambda *_: {"made": fails, "run": lambda: fails})
    _, made, run = run_case(c, ["reference"], clock.CpuClock(), ROOF)
    assert made.why_not == run.why_not == "AttributeError: no such function"


def test_torch_rotates_as_hadamard_does():
    for c in cases("hadamard", 3):
        args = c.arguments(False)
        got, expected = c.peers(*args)["torch bf16"]()(), HADAMARD(*args)
        assert torch.allclose(got.float(), expected.float(), atol=0.05), c.shape


def test_shapes():
    assert MODELS["llama3-8b"].linears == {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
    }
    for model in MODELS.values():
        assert model.num_q_heads % model.num_kv_heads == 0
        assert hadamard.exists(model.intermediate) and hadamard.exists(model.head_dim)
        assert Setup(model, (1,), (64,), CPU).rotations(128)[0][0] == model.intermediate


# lowbit bench


def test_bench(quick, capsys, tmp_path):
    path = tmp_path / "cpu.csv"
    args = ["bench", "hadamard", "--device", "cpu", "--M", "2", "--csv", str(path)]
    assert cli.main([*args, "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["wrong"] == 0 and result["rows"][0]["backend"] == "reference"
    assert result["roof"]["copy_gbs"] > 0 and "roof measured" in err
    assert [r.shape for r in report.read_csv(path)] == [r["shape"] for r in result["rows"]]
    assert cli.main(args) == 0
    assert "not timed: needs a CUDA device" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args,message",
    [
        (["hadamart", "--device", "cpu"], "op must be one of hadamard,"),
        (["--device", "cpu", "--shapes", "llama9"], "shapes must be among llama2-7b,"),
        (["--device", "cpu", "--M", "0"], "M must be positive, got 0"),
        (["--device", "tpu"], "device must be 'cuda' or 'cpu', got 'tpu'"),
    ],
)
def test_bench_errors(capsys, args, message):
    assert cli.main(["bench", *args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and len(err.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_without_a_gpu(capsys):
    assert cli.main(["bench"]) == 2
    assert "no CUDA device to measure; --device cpu" in capsys.readouterr().err


def test_bench_without_a_checkout(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(commands, "__file__", str(tmp_path / "lowbit/commands.py"))
    assert cli.main(["bench"]) == 2
    assert "lowbit bench needs a checkout of the repository" in capsys.readouterr().err


# what is measured, and how


def test_commit_and_facts():
    facts = machine.facts(CPU)
    assert facts["torch"] == torch.__version__ and facts["commit"]
    assert set(facts) <= set(report.COLUMNS) and facts["driver"] == ""


def test_prepared_calls_are_run():
    calls = []
    prepared = clock.CpuClock().prepare(lambda: calls.append(1))
    assert len(calls) == 2 and not prepared.is_graph  # warmed up, then estimated


def row_of(recipe, format, *perplexities, **more):
    texts = {name: {"packed": p} for name, p in zip("ab", perplexities, strict=True)}
    return {"of": {"limit": "8"}, "recipe": recipe, "format": format, "texts": texts, **more}


def test_the_table_of_methods(tmp_path):
    full = {"recipe": "full", "format": "fp32", "of": {"limit": "8"}}
    full["texts"] = {"a": {"perplexity": 9.876}, "b": {"perplexity": 10.0}}
    rows = [
        full,
        row_of("rtn", "w8a8", 1, 2, cost={"seconds": 9, "peak_bytes": 3e9}),
        row_of("rtn", "w4a4kv4", 12345.6, 123.45, cost={"seconds": 3.4, "peak_bytes": 2.04e9}),
        row_of(
            "rtn", "w8a8", 9.9, 10.126, cost={"seconds": 2, "peak_bytes": 2e9}
        ),  # measured again
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = methods_table.markdown(methods_table.read(path)).splitlines()
    assert table[0] == "a / b, full precision 9.88 / 10.00"
    assert "| rtn | 12346 / 123.5 |  |  |  |  | 9.90 / 10.13 | 2-3 | 2.0 |" in table
    assert "| gptq |  |  |  |  |  |  |  |  |" in table
    with pytest.raises(ValueError, match="of one protocol, got 2"):
        path.write_text(json.dumps(full) + "\n" + json.dumps({**full, "of": {}}) + "\n")
        methods_table.read(path)
    with pytest.raises(ValueError, match="no place for new"):
        methods_table.markdown({("full", "fp32"): full, ("new", "w8a8"): full})


def test_the_readme_has_the_rows_that_were_measured():
    root = Path(__file__).resolve().parents[1]
    assert methods_table.markdown(methods_table.read(methods_table.ROWS)) in (
        root / "README.md"
    ).read_text(encoding="utf-8")
    made = (root / "Makefile").read_text()
    assert all(f" {recipe}" in made for recipe in methods_table.METHODS)
