"""benchmarks/tune.py: what is measured, and the tables that are written from it."""

import json
import os
import re
from dataclasses import replace

import pytest
import torch

from benchmarks import clock, tables, tune
from benchmarks.shapes import MODELS, Setup
from benchmarks.workers import Workers
from lowbit.kernels import tiles
from lowbit.kernels.configs import CONFIGS
from lowbit.kernels.tiles import ANY, FILES, FOLDER, Tile

CPU = torch.device("cpu")
WHERE = {"device": "NVIDIA H200", "date": "2026-12-01", "commit": "0123456789ab"}
SMALL = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}
LARGE = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 4}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the tables, which the tool writes to."""
    for name in FILES:
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    monkeypatch.setattr(tiles, "FOLDER", tmp_path)
    return tmp_path


def measured(table: str, sizes: dict, us: list, shape: str = "s", **about) -> dict:
    """A line of a sweep: [(tile, its median)]."""
    timed = [{"tile": t, "us": {"p10": u, "p50": u, "p90": u}} for t, u in us]
    line = {"op": "int_gemm", "table": table, "dtype": "w4a8 bf16", "shape": shape}
    return {**WHERE, **line, "sizes": sizes, "tiles": timed, **about}


def own(table: str, entry: int) -> dict[str, int]:
    return tables.tile_of(tiles.read(FOLDER)[table][entry])


def int_gemm(M: int, N: int, *us, **about) -> dict:
    """A line for entry 0 where M is at most 16: the entry's own at 10 us, and others."""
    entry = 0 if M <= 16 else 1
    first = (own("INT_GEMM_TILES", entry), 10.0)
    line = measured("INT_GEMM_TILES", {"M": M, "N": N}, [first, *us], f"M={M} N={N}")
    return {**line, **about}


def write(folder, lines: list, *options: str) -> int:
    path = folder / "sweep.jsonl"
    path.write_text(
        "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    )
    return tune.main(["--from", str(path), *options])


def changes(folder) -> list[tuple[str, str]]:
    """(before, after) of each line that differs from the committed files'."""
    pairs = []
    for name in FILES:
        before, after = (f.joinpath(name).read_text().splitlines() for f in (FOLDER, folder))
        pairs += [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    return pairs


# the tables


def test_files_are_as_they_would_be_written():
    tables_now = tiles.read()
    for name, kind in FILES.items():
        assert tables.csv_text(kind, tables_now) == (FOLDER / name).read_text(encoding="utf-8")


def test_every_entry_is_compiled():
    """Also those that have the block sizes of another. A group may be shorter than BLOCK_K."""
    ops = {"INT": "int_gemm", "WEIGHT": "weight_only_gemm", "KV": "kv_attention"}
    for name, table in tiles.read().items():
        compiled = [
            {"BLOCK_M": 1, **c.constants, "num_warps": c.num_warps, "num_stages": c.num_stages}
            for c in CONFIGS[ops[name.split("_")[0]]]
            if ("*fp32" in (c.arguments.get("q"), c.arguments.get("x"))) == ("FP32" in name)
        ]
        for entry in table:
            sizes = tables.tile_of(entry)
            if "GROUPED" in name:
                sizes["BLOCK_K"] = min(sizes["BLOCK_K"], 128)
            ways = [c for c in compiled if sizes.items() <= c.items()]
            assert ways, f"{name} {tables.text_of(entry)}"


@pytest.mark.parametrize(
    "table,message",
    [
        ([Tile(ANY, ANY, 48, 64, 64, 4, 3)], "BLOCK_M must be a power of two, got 48"),
        ([Tile(ANY, ANY, 64, 64, 64, 4, 9)], "num_stages must be from 1 to 8, got 9"),
        ([Tile(ANY, ANY, 1, 64, 64, 4, 3)], "BLOCK_M must be at least 16, or 1 for a row"),
        ([Tile(64, ANY, 16, 64, 64, 4, 3), Tile(16, 64, 16, 64, 64, 4, 3)], "entry 1 is for what"),
        ([Tile(16, ANY, 16, 64, 64, 4, 3), Tile(ANY, 64, 16, 64, 64, 4, 3)], "the last entry must"),
    ],
)
def test_a_table_that_is_none(table, message):
    with pytest.raises(ValueError, match=f"^T: {message}"):
        tiles.check("T", table)


# the rule


def test_nothing_measured_is_nothing_written(folder, capsys):
    assert write(folder, []) == 0
    assert changes(folder) == [] and "written: nothing new" in capsys.readouterr().out


def test_a_faster_tile_takes_its_entry_alone(folder):
    lines = [int_gemm(8, 4096, (SMALL, 8.0), (LARGE, 9.0))]
    assert write(folder, lines) == 0
    before, after = changes(folder)[0]
    assert before == "INT_GEMM_TILES,16,any,16,32,256,4,4,not measured: predicted"
    assert (
        after == "INT_GEMM_TILES,16,any,16,64,128,4,3,NVIDIA H200 2026-12-01 0123456789ab 1 shape"
    )
    assert len(changes(folder)) == 1
    written = {name: (folder / name).read_bytes() for name in FILES}
    assert write(folder, lines) == 0  # the same measurements: the same files
    assert written == {name: (folder / name).read_bytes() for name in FILES}
    assert sorted(p.name for p in folder.iterdir()) == sorted([*FILES, "sweep.jsonl"])


def test_attention_has_its_own_file(folder):
    sizes = {"rows": 4, "head_dim": 128, "words": 32}
    tile = {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 2, "num_stages": 3}
    us = [(own("KV_ATTENTION_TILES", 2), 10.0), (tile, 5.0)]
    assert write(folder, [measured("KV_ATTENTION_TILES", sizes, us)]) == 0
    assert [b.rsplit(",", 1)[0] for _, b in changes(folder)] == [
        "KV_ATTENTION_TILES,16,256,32,16,64,2,3"
    ]


@pytest.mark.parametrize(
    "lines,taken",
    [
        ([int_gemm(8, 4096, (SMALL, 9.9))], False),  # a tie
        ([int_gemm(8, 4096, (SMALL, 5.0)), int_gemm(4, 4096, (SMALL, 19.0))], True),  # mean 9.7
        ([int_gemm(8, 4096, (SMALL, 5.0)), int_gemm(4, 4096, (SMALL, 21.0))], False),
        ([int_gemm(8, 4096, (SMALL, 5.0)), int_gemm(4, 4096, (LARGE, 5.0))], False),  # not at all
        ([int_gemm(8, 4096, (SMALL, 5.0)), int_gemm(8, 4096, (SMALL, 20.0))], False),  # the last
        ([int_gemm(8, 4096, (SMALL, 20.0)), int_gemm(8, 4096, (SMALL, 5.0))], True),
        ([int_gemm(8, 4096, (LARGE, 5.0), (SMALL, 5.0))], True),  # of equals the first fields
    ],
)
def test_the_rule(folder, lines, taken):
    assert write(folder, lines) == 0
    ((_, after),) = changes(folder)
    sizes = list((SMALL if taken else own("INT_GEMM_TILES", 0)).values())
    assert after.split(",")[3:-1] == list(map(str, sizes))
    assert after.endswith("shapes" if lines[0]["shape"] != lines[-1]["shape"] else "1 shape")


def test_a_refused_entry_is_replaced(folder, capsys):
    line = int_gemm(8, 4096, (SMALL, 50.0))
    line["tiles"][0] = {"tile": own("INT_GEMM_TILES", 0), "why_not": "wrong: OutOfResources"}
    assert write(folder, [line]) == 0
    assert changes(folder)[0][1].startswith("INT_GEMM_TILES,16,any,16,64,128,4,3,")
    assert "replaced, the old one was refused" in capsys.readouterr().out


def test_a_tile_is_left_out(folder):
    lines = [int_gemm(8, 4096, (SMALL, 8.0), (LARGE, 5.0))]
    assert write(folder, lines, "--without", "BLOCK_M=64", "BLOCK_N=128") == 0
    assert changes(folder)[0][1].startswith("INT_GEMM_TILES,16,any,16,64,128,4,3,")
    assert write(folder, lines, "--without", "BLOCK_M=16") == 0  # also where it is the entry's own
    assert changes(folder)[0][1].startswith("INT_GEMM_TILES,16,any,64,128,128,8,4,")


def test_an_unfinished_line_is_not_read(folder):
    lines = [int_gemm(8, 4096, (SMALL, 8.0)), json.dumps(int_gemm(32, 4096, (LARGE, 5.0)))[:-30]]
    assert write(folder, lines) == 0
    assert len(changes(folder)) == 1
    tune.append(folder / "sweep.jsonl", iter([int_gemm(32, 4096, (LARGE, 5.0))]))
    assert tune.main(["--from", str(folder / "sweep.jsonl")]) == 0
    assert len(changes(folder)) == 2


# errors


@pytest.mark.parametrize(
    "line,message",
    [
        (int_gemm(8, 64, table="INT_TILES"), r":1: table must be among .*, got 'INT_TILES'"),
        (int_gemm(8, 64, ({"BLOCK_M": 16}, 1.0)), r":1: a tile must have BLOCK_M, BLOCK_N,"),
        (int_gemm(8, 64, ({**SMALL, "BLOCK_N": 48}, 1.0)), r"BLOCK_N must be a power of two"),
        (int_gemm(8, 64, ({**SMALL, "BLOCK_M": 1}, 1.0)), r"BLOCK_M must be at least 16"),
        (int_gemm(8, 64, sizes={"rows": 1}), r":1: sizes must be M, N, got rows"),
        (int_gemm(8, 64, (SMALL, -1.0)), r":1: a time must be positive, got -1"),
        ({"op": "int_gemm"}, r":1: no 'table'"),
        ("op,backend\n", r":1: Expecting value"),
        (measured("INT_GEMM_TILES", {"M": 1, "N": 1}, [(SMALL, 1.0)]), r"not compared with the"),
    ],
)
def test_what_is_not_a_result(folder, capsys, line, message):
    with pytest.raises(SystemExit):
        write(folder, [line])
    assert changes(folder) == []
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, error), error


def test_results_of_two_devices(folder, capsys):
    with pytest.raises(SystemExit):
        write(folder, [int_gemm(8, 64), int_gemm(8, 128, device="NVIDIA A100")])
    assert "results must be of one device, got NVIDIA A100, NVIDIA H200" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args,message",
    [
        ([], "an op to measure, or --from"),
        (["int_gemm", "--from", "a"], "an op to measure, or --from"),
        (["--from", "a", "--without", "BLOCK_M"], "without must be like BLOCK_M=128, got BLOCK_M"),
        (["int_gemm", "--table", "lowbit.kernels.tiles:TILES"], "table must be module:NAME"),
        (["--from", "no-such-file"], "No such file"),
    ],
)
def test_errors(capsys, args, message):
    with pytest.raises(SystemExit):
        tune.main(args)
    assert message in capsys.readouterr().err


def test_a_killed_write_leaves_the_table(folder, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write(folder, [int_gemm(8, 4096, (SMALL, 8.0))])
    assert changes(folder) == []


# the sweep


def test_cases_and_entries():
    """Every case's sizes are what its launcher takes an entry by, and candidates suit them."""
    pytest.importorskip("triton")
    setup = Setup(MODELS["llama3-8b"], (1, 16, 2048), (4096,), CPU)
    found = {}
    for stem, sweep in tune.SWEEPS.items():
        table = tune.table_of(sweep.table)
        assert table is getattr(tiles, sweep.name)
        for case in tune.cases_of(stem, setup):
            if case.dtype == sweep.dtype and not case.variant:
                sizes = sweep.sizes(case)
                entry = tables.entry_for(table, sizes)
                rows = next(iter(sizes.values()))
                blocks = {t.BLOCK_M for t in tune.candidates(sweep, table[entry], rows)}
                found.setdefault((stem, entry), set()).update(blocks)
    assert found[("weight_only_gemm", 0)] == {1, 16}  # 1: a GEMV
    assert found[("weight_only_gemm", 1)] == {16} == found[("int_gemm", 0)]
    assert found[("int_gemm", 3)] == {16, 32, 64, 128}
    assert found[("kv_attention", 2)] == {16}  # decode: four rows a sequence
    assert found[("kv_attention", 7)] == {16, 32, 64, 128}


def test_tiles_are_replaced_and_put_back():
    pytest.importorskip("triton")
    for sweep in tune.SWEEPS.values():
        before = tune.table_of(sweep.table)
        tile = tune.candidates(sweep, before[0], 16)[0]
        assert tables.tile_of(tile) == tables.tile_of(before[0])  # its own comes first
        with pytest.raises(KeyError), tune.replaced(sweep.table, tile):
            assert tune.table_of(sweep.table) == (tile,)
            raise KeyError
        assert tune.table_of(sweep.table) is before


class InThisProcess:
    """Workers that are none. Of the candidates for entry 1 its own is refused."""

    reason = "wrong: one"

    def __init__(self, _):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def map(self, call, candidates):
        reasons = [call(candidate)[0] for candidate in candidates]
        assert reasons == [None] * len(candidates)
        own_tile = own("INT_GEMM_TILES", 1)
        return [self.reason if tables.tile_of(c.tile) == own_tile else None for c in candidates]


def test_a_sweep(folder, monkeypatch, capsys):
    """The reference on a CPU stands in: every case is a line, each of their entries is written."""
    pytest.importorskip("triton")
    monkeypatch.setattr(clock, "FEWEST_REPEATS", 2)
    monkeypatch.setattr(clock, "BUDGET_US", 1)
    monkeypatch.setattr(clock, "CPU_FLUSH_BYTES", 1 << 10)
    monkeypatch.setattr(tune, "BACKEND", "reference")
    monkeypatch.setattr(tune, "Workers", InThisProcess)
    few = {"BLOCK_M": (16, 32, 64), "BLOCK_N": (32, 64)}
    monkeypatch.setitem(tune.SWEEPS, "int_gemm", replace(tune.SWEEPS["int_gemm"], fields=few))
    path = folder / "sweep.jsonl"
    command = ["int_gemm", "--device", "cpu", "--shapes", "tiny", "--M", "1", "20", "-o", str(path)]
    assert tune.main(command) == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["sizes"]["M"] for line in lines] == [1] * 4 + [20] * 4
    assert len({line["shape"] for line in lines}) == 8
    for line in lines:  # of M = 1: 16 x 32, its own, and 16 x 64; of 20: 16 and 32 rows
        assert len(line["tiles"]) == (2 if line["sizes"]["M"] == 1 else 5)
        refused = [t["tile"] for t in line["tiles"] if "us" not in t]
        assert refused == ([] if line["sizes"]["M"] == 1 else [own("INT_GEMM_TILES", 1)])
    written = tiles.read(folder)["INT_GEMM_TILES"]
    assert ["4 shapes" in t.measured for t in written] == [True, True, False, False]
    assert written[1].BLOCK_M in (16, 32)
    assert "the old one was refused" in capsys.readouterr().out
    path.unlink()  # and where its own could not be checked, nothing is said of entry 1
    monkeypatch.setattr(InThisProcess, "reason", "not checked: OutOfMemoryError")
    assert tune.main(command) == 0
    assert [json.loads(line)["sizes"]["M"] for line in path.read_text().splitlines()] == [1] * 4
    assert "  not measured: not checked: OutOf" in capsys.readouterr().err


def test_a_worker_that_had_a_fault_is_replaced():
    """eval: what a new process can run without importing torch."""
    pid = "__import__('os').getpid()"
    with Workers(1) as workers:
        first, second, third = workers.map(
            eval, [f"({pid}, False)", f"({pid}, True)", f"({pid}, False)"]
        )
        assert first == second != third
        died = workers.map(eval, ["__import__('os')._exit(1)", f"({pid}, False)"])
    assert died[0] == "wrong: it ended its process" and died[1] not in (first, third)
