"""pack and unpack: codes of weights and activations, each width that packs densely."""

from collections.abc import Iterator
from functools import partial

from benchmarks import inputs, peers
from benchmarks.harness import Case, Peers, shape_text
from benchmarks.shapes import Setup
from lowbit.formats import IntFormat
from lowbit.ops.pack import PACK, UNPACK

BITS = (2, 3, 4)  # 8 bits are copied


def cases(setup: Setup) -> Iterator[Case]:
    for K in setup.row_lengths():
        for M in setup.rows:
            for bits in BITS:
                yield _pack(setup.device, M, K, bits)
                yield _unpack(setup.device, M, K, bits)


def _pack(device, M: int, K: int, bits: int) -> Case:
    def arguments(_exact: bool) -> tuple:  # integers: every input is exact
        return inputs.codes((M, K), IntFormat(bits), device), bits

    return Case(
        PACK,
        shape_text(M=M, K=K),
        f"int{bits}",
        inputs.CODES,
        arguments,
        partial(_peers, PACK.reference),
    )


def _unpack(device, M: int, K: int, bits: int) -> Case:
    def arguments(_exact: bool) -> tuple:
        return inputs.random_bytes((M, K * bits // 8), device), bits, True

    return Case(
        UNPACK,
        shape_text(M=M, K=K),
        f"int{bits}",
        inputs.CODES,
        arguments,
        partial(_peers, UNPACK.reference),
    )


def _peers(reference, *args) -> Peers:
    return {"torch.compile": partial(peers.compiled, reference, *args)}
