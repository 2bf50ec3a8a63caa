"""hqq, whose zero points are real numbers, or rounded once it has found them."""

import torch
from hqq.core.quantize import Quantizer
from job import Job, Refused, Stopwatch, Tensor, Tensors, block_tensors, linears_of, load_model, run


def quantize(job: Job, windows: Tensor) -> tuple[Tensors, str, float]:
    if job.method not in ("rtn", "hqq"):
        raise Refused(f"has no {job.method}")
    if job.symmetric:
        raise Refused("its grids are asymmetric")
    model = load_model(job)
    watch = Stopwatch()
    for linear in linears_of(model).values():
        linear.weight.data = _quantized(linear.weight.data, job)
    solver = "" if job.method == "rtn" else ", p 0.7, beta 10 x 1.01^i, at most 20 iterations"
    zero = "rounded at the end" if job.options.get("integer_zero") else "real"
    return block_tensors(model), f"axis 1, zero points {zero}{solver}", watch.seconds


@torch.no_grad()
def _quantized(weight: Tensor, job: Job) -> Tensor:
    codes, meta = Quantizer.quantize(
        weight,
        nbits=job.bits,
        group_size=job.group_size,
        optimize=job.method == "hqq",
        axis=1,
        bitpack=False,
        compute_dtype=torch.float32,
        device="cpu",
    )
    if not job.options.get("integer_zero"):
        return Quantizer.dequantize(codes, meta).view_as(weight)
    largest = 2**job.bits - 1
    zero = meta["zero"].round().clamp(0, largest)
    groups = weight.view(-1, job.group_size)
    codes = (groups / meta["scale"] + zero).round().clamp(0, largest)
    return ((codes - zero) * meta["scale"]).view_as(weight)


run("hqq", quantize)
