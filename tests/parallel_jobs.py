"""What test_parallel.py has two processes do, which fork from this one: lowbit is imported once.

python parallel_jobs.py FOLDER; each process of a job leaves there JOB-RANK.pt and what it printed.
"""

import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

import torch
from brief import brief
from models import tiny_config, tiny_llama, tiny_model, tiny_tokens
from transformers import MixtralConfig

import lowbit
from lowbit import cli, parallel, streams
from lowbit.errors import InputError
from lowbit.executor import Executor
from lowbit.recipes import overridden

PROCESSES, PATIENCE = 2, 300  # seconds for a job, where all wait for each other
CALIBRATION = tiny_tokens(9, 32, seed=9)  # one has five windows, one four
# Statistics of one stream and of two; a grid search on whole streams and on their heads, for
# weights alone and with activations; gradients with batches that are random, one sample, and with
# scales; rotations learned end to end and fitted to rows of activations. Where products can be in
# bf16 they are not: their errors are not those of order alone. Of experts a process has few tokens
# or, in a piece, none; behind 4-bit inputs and K another order of sums sends a token elsewhere.
METHODS = {
    "gptq": ("w4a4kv4", ["rounding.clip=none"]),
    "gptaq": ("w4a4kv4", ["rounding.clip=none"]),
    "awq": ("w3a16g32-wasym", [f"transforms.{i}.fit.steps=5" for i in range(4)]),
    "smoothquant": ("w4a4", []),
    "os+": ("w4a4", [f"transforms.{i}.fit.{s}" for i in (0, 1) for s in ("steps=5", "tokens=64")]),
    "autoround": ("w2a16g32-wasym", ["rounding.autocast=False"]),
    "omniquant-let": ("w4a4", ["rounding.batch=1", "rounding.epochs=2"]),
    "spinquant-rtn": (
        "w4a4kv4",
        ["training.batch=3", "training.autocast=False", "rounding.clip=none"],
    ),
    "spinquant": (  # one process has no sequence
        "w4a4kv4",
        ["training.batch=1", "training.autocast=False", "rounding.clip=none"],
    ),
    "flatquant-gptaq": ("w4a4kv4", []),
    "dartquant": ("w8a8kv8", ["training.steps=4", "rounding.clip=none"]),
    "gptaq, experts": ("w4a8kv8", ["rounding.clip=none"]),
    "awq, experts": ("w4a16", [f"transforms.{i}.fit.steps=5" for i in range(4)]),
    "autoround, experts": ("w2a16g32-wasym", ["rounding.autocast=False"]),
}


def quantized(name: str) -> tuple[dict, dict]:
    """(state dict, report)."""
    format, settings = METHODS[name]
    recipe, _, experts = name.partition(", ")
    recipe = overridden(brief(recipe), settings)
    streams.TOKENS_AT_ONCE = 64  # several pieces a process
    model = tiny_model(tiny_config(MixtralConfig)) if experts else tiny_llama()
    model = lowbit.quantize(model, recipe, format, CALIBRATION, progress=False)
    return dict(model.state_dict()), model.lowbit_config.report


def methods(folder: Path):
    return {name: quantized(name) for name in METHODS}


def too_few_windows(folder: Path):
    try:
        lowbit.quantize(tiny_llama(), "gptq", "w4a4", CALIBRATION[:1], progress=False)
    except InputError as error:
        return str(error)


def not_finite_in_one(folder: Path):
    try:
        streams.check_finite("here", torch.tensor([0.0, torch.nan if parallel.rank() else 1.0]))
    except InputError as error:
        return str(error)


def command(folder: Path):
    """Quantize, then again from what was saved, then where there is a folder already."""
    words = f"quantize {folder / 'source'} --recipe gptq --format w4a4 --samples 5 --length 32 "
    words += f"--resume {folder / 'saved'} --json -o {folder}/"
    return [cli.main(f"{words}{output}".split()) for output in ("out", "again", "out")]


def failure(folder: Path):
    """An error of one process alone."""
    run = Executor.run

    def broken(executor, block, index):
        if index == 1 and parallel.rank() == 1:
            raise ValueError("broken in one")
        return run(executor, block, index)

    Executor.run = broken
    lowbit.quantize(tiny_llama(), "gptq", "w4a4", CALIBRATION, progress=False)


def work(job, folder: Path, rank: int, port: int):
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(PROCESSES), MASTER_PORT=str(port)
    )
    for stream, suffix in ((sys.stdout, "out"), (sys.stderr, "err")):
        file = os.open(folder / f"{job.__name__}-{rank}.{suffix}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, stream.fileno())
    if job is not command:  # which starts by itself
        parallel.start(torch.device("cpu"))
    torch.save(job(folder), folder / f"{job.__name__}-{rank}.pt")
    parallel.finish()


def main(folder: Path, jobs: tuple):
    """Each job by PROCESSES processes; how each ended is left in ended.pt."""
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    fork = multiprocessing.get_context("fork")
    ended = {}
    for job in jobs:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        group = [
            fork.Process(target=work, args=(job, folder, rank, port)) for rank in range(PROCESSES)
        ]
        for process in group:
            process.start()
        last = time.monotonic() + PATIENCE
        for process in group:
            process.join(last - time.monotonic())
        ended[job.__name__] = [process.exitcode for process in group]
        for process in group:
            process.kill()
    torch.save(ended, folder / "ended.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), (methods, too_few_windows, not_finite_in_one, command, failure))
