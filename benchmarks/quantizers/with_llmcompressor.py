"""llm-compressor: RTN, GPTQ and AWQ through oneshot, one decoder layer after another."""

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from job import (
    Job,
    Refused,
    Stopwatch,
    Tensor,
    Tensors,
    block_tensors,
    linears_of,
    load_model,
    run,
)
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache


def quantize(job: Job, windows: Tensor) -> tuple[Tensors, str, float]:
    recipe, settings = _recipe(job)
    if not torch.accelerator.is_available():  # AWQModifier pins memory all the same
        IntermediatesCache.pin_memory = lambda self, batch_index, input_names=None: None
    ids = windows.tolist()
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    model = load_model(job)
    watch = Stopwatch()
    oneshot(
        model=model,
        recipe=recipe,
        dataset=None if job.method == "rtn" else data,
        num_calibration_samples=len(windows),
        max_seq_length=windows.shape[1],
        shuffle_calibration_samples=False,
    )
    seconds = watch.seconds
    with torch.no_grad():
        for linear in linears_of(model).values():  # whose weights may be not rounded yet
            linear.weight.copy_(_dequantized(linear))
    names = set(dict(load_model(job).named_parameters()))
    tensors = {name: t for name, t in block_tensors(model).items() if name in names}
    return tensors, settings, seconds


def _dequantized(linear: torch.nn.Linear) -> Tensor:
    return fake_quantize(
        linear.weight,
        linear.weight_scale,
        linear.weight_zero_point,
        linear.quantization_scheme.weights,
        getattr(linear, "weight_g_idx", None),
    )


def _recipe(job: Job):
    observer = "memoryless_mse" if job.method == "gptq-clip" else "memoryless_minmax"
    weights = QuantizationArgs(
        num_bits=job.bits,
        type="int",
        symmetric=job.symmetric,
        strategy="group",
        group_size=job.group_size,
        observer=observer,
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    common = {"config_groups": groups, "ignore": ["lm_head"]}
    options = job.options
    if job.method == "rtn":
        return QuantizationModifier(**common), f"observer {observer}"
    if job.method in ("gptq", "gptq-clip"):
        modifier = GPTQModifier(**common, dampening_frac=options["damp"], actorder="static")
        return modifier, f"actorder static, dampening_frac {options['damp']}, observer {observer}"
    if job.method == "awq":
        duo, steps = options["duo_scaling"], options["steps"]
        awq = AWQModifier(duo_scaling=duo, n_grid=steps)
        return [awq, QuantizationModifier(**common)], f"n_grid {steps}, duo_scaling {duo}, no clip"
    raise Refused(f"has no {job.method}")


run("llmcompressor", quantize)
