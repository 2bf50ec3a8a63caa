"""One case: checked, then timed beside its peers, one Row each.

A case is one call of an op at one shape. Before a backend is timed it must give the reference's
bits on exact inputs of that very shape; one that does not is reported, never timed.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from benchmarks.clock import Clock, Prepared, interleaved
from benchmarks.machine import Roof, clocks
from benchmarks.report import Row
from lowbit import cuda
from lowbit.ops.dispatch import NoBackendError, Op

Peer = Callable[[], object] | str  # the call, or the reason why there is none
Peers = dict[str, Callable[[], Peer]]  # how each is made, by name


@dataclass(frozen=True)
class Case:
    """One call to time.

    arguments   exact -> the op's arguments, on the device: exact ones to check, random ones to time
    peers       (*arguments) -> what to compare with; the first is torch's own way
    operations  multiplications and additions of the matrix products, 0 where there are none
    rate        the matrix units that do them, as Roof.matmul_tops names them
    nbytes      where the contract's tensors are not what is read and written, see contract_bytes
    run         (*arguments, backend=...) where it is not one call of the op
    variant     what `run` then is, for the row
    prepare     (arguments, backend) -> the same, weights in the layout that the backend reads
    plan        the numbers of the op's planner in csrc, which says what a CUDA kernel's launch is
    """

    op: Op
    shape: str
    dtype: str
    inputs: str
    arguments: Callable[[bool], tuple]
    peers: Callable[..., Peers]
    operations: int = 0
    rate: str = "bf16"
    nbytes: int | None = None
    run: Callable | None = None
    variant: str = ""
    prepare: Callable[[tuple, str], tuple] | None = None
    plan: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.op.name} {self.variant}".strip()

    def prepared(self, args: tuple, backend: str) -> tuple:
        """The arguments as a layer would hold them: its weights are laid out once."""
        return args if self.prepare is None else self.prepare(args, backend)

    def call(self, args: tuple, backend: str):
        return (self.run or self.op)(*args, backend=backend)


def tensors(values) -> Iterator[Tensor]:
    """Those in a tensor, None, a number, or tuples of them."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors(value)


def contract_bytes(op: Op, args: tuple) -> int:
    """Bytes of the op's tensor arguments, each read once, and of what it returns, written once.

    A packed operand counts with the bytes it is packed into.
    """
    return sum(t.numel() * t.element_size() for t in tensors((args, op.fake(*args))))


def gate(case: Case, backend: str) -> str | None:
    """None where the backend gives the reference's bits on exact inputs, else what is wrong.

    The arguments are compared too: what an op writes in place, and that it changes nothing else.
    """
    torch.manual_seed(0)
    args = case.arguments(True)
    call_args = case.prepared(args, backend)
    with poisoned_memory():
        got = [*tensors(case.call(call_args, backend)), *tensors(args)]
    torch.manual_seed(0)
    args = case.arguments(True)
    expected = [*tensors(case.call(args, "reference")), *tensors(args)]
    if len(got) != len(expected):
        return f"wrong: {len(got)} tensors, not {len(expected)}"
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return (
                f"wrong: tensor {i} is {a.dtype} {tuple(a.shape)}, not {b.dtype} {tuple(b.shape)}"
            )
        differs = bits(a) != bits(b)
        if differs.any():
            return f"wrong: {int(differs.sum())} of {a.numel()} elements of tensor {i} differ"
    return None


def bits(t: Tensor) -> Tensor:
    """The bits of each element as an integer: nan equals nan, 0 is not -0."""
    same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.contiguous().view(same_size[t.element_size()])


@contextlib.contextmanager
def poisoned_memory():
    """Memory that torch.empty hands out holds NaN, or the largest integer, until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def checked(case: Case, backend: str) -> str | None:
    """gate(), with what stops the call as the reason."""
    try:
        return gate(case, backend)
    except NoBackendError as error:
        return str(error).splitlines()[-1].strip()
    except torch.OutOfMemoryError as error:  # the reference may need far more than the kernel
        return f"not checked: {reason_of(error)}"
    except Exception as error:  # a kernel that does not compile or launch must not end the run
        return f"wrong: {reason_of(error)}"


def reason_of(error: Exception) -> str:
    """Type and first line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


@torch.inference_mode()
def run_case(case: Case, backends: list[str], clock: Clock, roof: Roof) -> list[Row]:
    """A row for each backend and each peer."""
    torch.manual_seed(0)
    try:
        args = case.arguments(False)
    except torch.OutOfMemoryError as error:
        return [_row(case, backend, "", why_not=reason_of(error)) for backend in backends]
    peers = case.peers(*args)
    prepared, why_not = _contenders(case, args, backends, peers, clock)
    timings = interleaved(clock, prepared) if prepared else {}
    at = clocks(clock.device)
    cold = {name: timing[0].p50 for name, timing in timings.items()}
    torch_us = cold.get(next(iter(peers), None))
    best_us = min((us for name, us in cold.items() if name in peers), default=None)
    nbytes = contract_bytes(case.op, args) if case.nbytes is None else case.nbytes
    rows = []
    for name in (*backends, *peers):
        backend, peer = (name, "") if name in backends else ("", name)
        row = _row(case, backend, peer, why_not=why_not.get(name, ""))
        row = replace(row, bytes=nbytes, operations=case.operations)
        if name in timings:
            row = _timed(row, *timings[name], roof, case.rate, torch_us, best_us)
            row = replace(row, launch="graph" if prepared[name].is_graph else "loop", **at)
            row = replace(row, plan=_plan(case, clock.device) if backend == "cuda" else "")
        rows.append(row)
    return rows


def _contenders(
    case: Case, args: tuple, backends: list[str], peers: Peers, clock: Clock
) -> tuple[dict[str, Prepared], dict[str, str]]:
    """Those that can be timed, and why the others cannot."""
    prepared: dict[str, Prepared] = {}
    why_not: dict[str, str] = {}
    for backend in backends:
        reason = checked(case, backend)
        if reason is not None:
            why_not[backend] = reason
            continue
        try:
            own = case.prepared(args, backend)
            prepared[backend] = clock.prepare(lambda b=backend, own=own: case.call(own, b))
        except Exception as error:  # no memory for a second set of arguments, say
            why_not[backend] = reason_of(error)
    for name, make in peers.items():
        try:
            peer = make()
            if isinstance(peer, str):
                why_not[name] = peer
            else:
                prepared[name] = clock.prepare(peer)
        except Exception as error:  # another version of it, or a shape that it does not take
            why_not[name] = reason_of(error)
    return prepared, why_not


def _plan(case: Case, device: torch.device) -> str:
    if not case.plan:
        return ""
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    try:
        launch = cuda.launch()
    except RuntimeError as error:  # not built for this Python, which the kernels do not need
        return f"unknown: {reason_of(error)}"
    return launch.plan(case.op.name, list(case.plan), cuda.sm(device), num_sms)


def _row(case: Case, backend: str, peer: str, why_not: str) -> Row:
    return Row(case.name, backend, peer, case.shape, case.dtype, case.inputs, why_not)


def _timed(row: Row, cold, warm, roof: Roof, rate: str, torch_us, best_us) -> Row:
    """The row with its times. A peer moves other bytes than the op: only its times are given."""
    of_op = {}
    if row.backend:
        floor = roof.floor_us(row.bytes, row.operations, rate)
        of_op = {
            "floor_us": floor,
            "gbs": row.bytes / cold.p50 / 1e3,
            "tops": row.operations / cold.p50 / 1e6 if row.operations else None,
            "roof_percent": 100 * floor / cold.p50,
        }
    percentiles = {
        f"{heat}_{name}_us": value
        for heat, timing in (("cold", cold), ("warm", warm))
        for name, value in asdict(timing).items()
    }
    return replace(
        row,
        **percentiles,
        **of_op,
        vs_torch=None if torch_us is None else torch_us / cold.p50,
        vs_best=None if best_us is None else best_us / cold.p50,
        roof_copy_gbs=roof.copy_gbs,
        roof_bf16_tops=roof.matmul_tops["bf16"],
        roof_int8_tops=roof.matmul_tops["int8"],
    )


def shape_text(**sizes: int) -> str:
    """M=16 N=4096 K=4096"""
    return " ".join(f"{name}={size}" for name, size in sizes.items())


def product(*sizes: int) -> int:
    """Operations of a matrix product of these three sizes."""
    return 2 * math.prod(sizes)
