"""`python -m benchmarks.check [OP ...]`: the gate of every case, nothing timed.

What a benchmark of these shapes would refuse is found, and its kernels are compiled, by as many
processes as there are cores; on tiny shapes it is what a memory checker runs.
"""

import argparse
import sys
from collections import Counter

import torch

from benchmarks.harness import checked
from benchmarks.run import backends_for, cases_of, device_named, selected
from benchmarks.shapes import Setup, model_named
from lowbit.errors import InputError
from lowbit.ops.dispatch import BACKENDS


@torch.inference_mode()
def check(stem: str, setup: Setup, backend: str) -> bool:
    """Whether no case of the op is wrong; prints what is, and why others did not run."""
    reasons = Counter()
    for case in cases_of(stem, setup):
        reason = checked(case, backend)
        reasons[reason] += 1
        if reason is not None and reason.startswith("wrong"):
            print(f"{case.name} {backend}  {case.shape}  {case.dtype}: {reason}", flush=True)
    right = reasons.pop(None, 0)
    print(f"{stem} {backend}: {right} of {right + reasons.total()} cases right", flush=True)
    for reason, count in reasons.items():
        if not reason.startswith("wrong"):
            print(f"  {count} not run: {reason}", flush=True)
    return not any(reason.startswith("wrong") for reason in reasons)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check", description=__doc__)
    parser.add_argument("op", nargs="*")
    parser.add_argument("--shapes", nargs="+", default=["tiny"])
    parser.add_argument("--M", nargs="+", type=int, default=[1, 17])
    parser.add_argument("--context", nargs="+", type=int, default=[64, 1024])
    parser.add_argument("--backend", choices=BACKENDS)
    parser.add_argument("--device")
    args = parser.parse_args()
    try:
        device = device_named(args.device)
        models = [model_named(name) for name in args.shapes]
        stems = selected(args.op)
    except InputError as error:
        parser.error(str(error))
    right = [
        check(stem, Setup(model, tuple(args.M), tuple(args.context), device), backend)
        for backend in backends_for(device, args.backend)
        for stem in stems
        for model in models
    ]
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
