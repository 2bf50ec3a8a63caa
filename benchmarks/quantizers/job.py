"""One quantization, as the Python of another package sees it: a folder in, the same folder out.

    python with_<package>.py FOLDER

    job.json             what to do: the fields of Job
    windows.pt           int64 [samples, length], the tokens to calibrate on
    weights.safetensors  <- fp32, the blocks' tensors by the names of the model, dequantized
    report.json          <- {"version": ..., "settings": ..., "seconds": ...}, or {"refused": why}

Needs torch, transformers and safetensors, not lowbit: the package's environment has its own.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

JOB, WINDOWS, WEIGHTS, REPORT = "job.json", "windows.pt", "weights.safetensors", "report.json"

Tensors = dict[str, Tensor]


class Refused(Exception):
    """What a package cannot do; its message is the reason."""


@dataclass(frozen=True)
class Job:
    """model: a folder; options: of the method, as METHODS of benchmarks/accuracy.py names them."""

    model: str
    method: str
    bits: int
    group_size: int
    symmetric: bool
    options: dict = field(default_factory=dict)
    seed: int = 0

    def write(self, folder: Path, windows: Tensor):
        (folder / JOB).write_text(json.dumps(asdict(self)))
        torch.save(windows, folder / WINDOWS)


def load_model(job: Job) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).eval()


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """What every package quantizes: all linears but the head."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("lm_head")
    }


def block_tensors(model: nn.Module) -> Tensors:
    """The blocks' parameters: weights, and the norms that a method may have scaled."""
    return {name: p.detach() for name, p in model.named_parameters() if ".layers." in name}


def run(package: str, quantize: Callable[[Job, Tensor], tuple[Tensors, str, float]]):
    """Do the job of the folder that the command line names.

    quantize    (job, windows) -> the blocks' tensors, the settings in the package's own words, and
                the seconds it took without reading the model. Raises Refused
    """
    folder = Path(sys.argv[1])
    job = Job(**json.loads((folder / JOB).read_text()))
    torch.manual_seed(job.seed)
    report = {"version": f"{package} {version(package)}, torch {torch.__version__}"}
    try:
        tensors, settings, seconds = quantize(job, torch.load(folder / WINDOWS))
        report |= {"settings": settings, "seconds": seconds}
        tensors = {name: t.float().contiguous().cpu() for name, t in tensors.items()}
        save_file(tensors, folder / WEIGHTS)
    except Refused as refused:
        report["refused"] = str(refused)
    (folder / REPORT).write_text(json.dumps(report))


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self):
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start
