"""lowbit itself, as one of the packages: its recipes, through the same files."""

from dataclasses import replace

from job import Job, Stopwatch, Tensor, Tensors, block_tensors, load_model, run

from lowbit.formats import IntFormat, QuantFormat
from lowbit.nn.linear import QuantLinear
from lowbit.ops import dequantize
from lowbit.quantize import quantize as quantize_model
from lowbit.recipes import Recipe, recipe_named
from lowbit.rounding import RTN


def quantize(job: Job, windows: Tensor) -> tuple[Tensors, str, float]:
    recipe, settings = _recipe(job)
    format = QuantFormat(IntFormat(job.bits, job.symmetric, job.group_size))
    model = load_model(job)
    watch = Stopwatch()
    model = quantize_model(model, recipe, format, windows, seed=job.seed, progress=False)
    seconds = watch.seconds
    tensors = {name: t for name, t in block_tensors(model).items() if t.is_floating_point()}
    tensors = {name: t for name, t in tensors.items() if name.endswith("norm.weight")}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            tensors[f"{name}.weight"] = dequantize(module.packed_weight)
    return tensors, settings, seconds


def _recipe(job: Job) -> tuple[Recipe, str]:
    """The recipe, and what it is set to, in words."""
    options, method = job.options, job.method
    recipe = recipe_named(method.removesuffix("-clip"))
    rounding = recipe.rounding
    if method in ("gptq", "gptq-clip"):
        clip = "weight" if method == "gptq-clip" else "none"
        rounding = replace(rounding, damp=options["damp"], clip=clip)
        settings = f"act_order, static_groups, true_sequential, damp {rounding.damp}, clip {clip!r}"
    elif method in ("awq", "awq-clip"):
        rounding = RTN(clip="output" if method == "awq-clip" else "none")
        fits = [replace(t, fit=replace(t.fit, steps=options["steps"])) for t in recipe.transforms]
        recipe = replace(recipe, transforms=tuple(fits))
        settings = f"steps {options['steps']}, clip {rounding.clip!r}"
    elif method == "autoround":
        rounding = replace(rounding, steps=options["steps"], batch=options["batch"])
        settings = (
            f"steps {rounding.steps}, batch {rounding.batch}, rates 1 / steps, rounded inputs"
        )
    elif method == "hqq":
        settings = (
            f"p {rounding.p}, beta {rounding.beta:g} x {rounding.growth}^i, "
            f"{rounding.iterations} iterations, zero points integers"
        )
    else:
        settings = f"clip {rounding.clip!r}"
    return replace(recipe, rounding=rounding), settings


run("lowbit", quantize)
