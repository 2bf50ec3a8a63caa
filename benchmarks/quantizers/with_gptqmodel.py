"""gptqmodel: GPTQ in fp32, saved and read again by its torch backend, which dequantizes in fp16."""

import os
import tempfile

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from gptqmodel.quantization.config import GPTQConfig
from job import Job, Refused, Stopwatch, Tensor, Tensors, block_tensors, load_model, run


def quantize(job: Job, windows: Tensor) -> tuple[Tensors, str, float]:
    if job.method not in ("gptq", "gptq-clip"):
        raise Refused(f"{job.method} is not run with it")
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it needs two, and on two cores makes one
    torch._dynamo.config.disable = True  # its dequantize_weight would be compiled, for one call
    norm = 2.4 if job.method == "gptq-clip" else 0.0
    config = GPTQConfig(
        bits=job.bits,
        group_size=job.group_size,
        sym=job.symmetric,
        desc_act=True,
        static_groups=True,
        act_group_aware=False,
        damp_percent=job.options["damp"],
        mse=norm,
        offload_to_disk=False,
        device="cpu",
    )
    model = GPTQModel.load(job.model, config, dtype=torch.float32)
    watch = Stopwatch()
    rows = [
        {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in windows
    ]
    model.quantize(rows, batch_size=1)
    seconds = watch.seconds
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        saved = GPTQModel.load(folder, backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)
    tensors = block_tensors(load_model(job))
    for name, module in saved.model.named_modules():
        if isinstance(module, BaseQuantLinear):
            tensors[f"{name}.weight"] = module.dequantize_weight().T
    damp = config.damp_percent
    settings = f"desc_act, static_groups, true_sequential, damp_percent {damp}, mse {norm}"
    return tensors, settings, seconds


run("gptqmodel", quantize)
