"""The pipeline: a float model, a recipe and a format in; a packed model out.

Block-sequential: one block at a time is read, converted to fp32, transformed (fused in fp64),
calibrated stage by stage on the outputs of the blocks already rounded, rounded, and reduced to its
codes, which a GPU leaves to the CPU until all are done. A model given by name is never whole in
memory: there are its embedding and head, the blocks packed so far, one block in fp32, the
calibration activations entering it, and what solving for its largest linear takes. That is less
than the model in bf16, one block in fp32 and the activations (docs/notes/0001, "Memory"); a method
that learns a whole block takes several times that block more (lowbit/rounding/block.py), and where
rotations are learned the model is whole, and a copy of it in fp32 beside it (lowbit/training.py). A
model object is whole from the start; its blocks shrink in turn. Several processes share the
calibration windows (lowbit/parallel.py); each has all the rest.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowbit import parallel
from lowbit.config import LowbitConfig
from lowbit.doctor import installed_version
from lowbit.errors import InputError
from lowbit.evaluate.text import check_token_ids, manual_text
from lowbit.executor import Executor, needed_streams
from lowbit.finished import FinishedBlock
from lowbit.formats import QuantFormat
from lowbit.integrations import attach
from lowbit.model_card import made_from
from lowbit.models import Adapter, adapter_of
from lowbit.models.source import open_source
from lowbit.models.stored import StoredModel
from lowbit.nn.swap import swap
from lowbit.progress import Progress, fingerprint
from lowbit.recipes import Calibration, Recipe, recipe_named, settings_of
from lowbit.rounding import RTN
from lowbit.tensor_parallel import check_ranks
from lowbit.transforms import (
    FittedTransforms,
    FoldNorms,
    LearnRotation,
    Rotate,
    fit,
)
from lowbit.transforms.cost import costs_on

ROWS_AT_ONCE = 1024  # of a weight that is checked: it may not fit a second time


def quantize(
    model: PreTrainedModel | StoredModel | str,
    recipe: str | Recipe = "quarot",
    format: str | QuantFormat = "w4a4kv4",
    calibration: Tensor | str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    progress: bool = True,
    resume: str | Path | None = None,
) -> PreTrainedModel:
    """Quantize a model in place and return it, its linear and attention layers packed.

    model        a folder, hub name or "smollm2-135m", whose blocks are read one at a time (or what
                 open_source makes of it); or a Hugging Face model. Consumed: its weights are
                 released block by block as they are packed
    calibration  token windows int64 [samples, length], or a text to take them from; None: the
                 Python manual. Unused by recipes that need none
    tokenizer    needed to calibrate a model object on a text
    seed         of random rotations, of the choice of windows and of their order in batches
    resume       a folder where what is learned and each block that is done are saved; the same
                 call goes on from there after a kill, to the same bits. Yours to delete

    Raises InputError for an unknown recipe, format or architecture, a group size that does not
    divide, sizes that the recipe's tensor_parallel does not divide, weights or calibration
    activations that are not finite, a text too short, and where `resume` holds another fit.
    """
    recipe = recipe_named(recipe) if isinstance(recipe, str) else recipe
    format = QuantFormat.parse(format) if isinstance(format, str) else format
    if isinstance(model, str):
        model, tokenizer = open_source(model)
    stored = model if isinstance(model, StoredModel) else None
    if stored:
        model = stored.model
    if getattr(model, "lowbit_config", None) is not None:
        raise InputError(f"model must not be quantized yet, got {model.lowbit_config.format}")
    adapter = replace(adapter_of(model), ranks=recipe.tensor_parallel)
    model.eval().requires_grad_(False)
    check_weights(model, stored, adapter, format)
    check_ranks(model, adapter, format.weight, recipe.tensor_parallel)
    windows = texts = None
    vocabulary = model.get_input_embeddings().num_embeddings
    if needed_streams(recipe, format):
        windows = _windows(calibration, tokenizer, recipe.calibration, seed, vocabulary)
    transforms = _useful(recipe.transforms, adapter, format)
    fitted = fit(transforms, adapter, seed, costs_on(model.device))
    learns = bool(fitted.learned) and not (format.weight is None and format.kv is None)
    if learns:
        spec = Calibration(recipe.training.samples, recipe.training.length)
        texts = _windows(calibration, tokenizer, spec, seed, vocabulary)
    of = {}
    if resume is not None:
        of = _fit_of(recipe, fitted, format, seed, (windows, texts), model, stored)
    saved = Progress(resume, of)

    learned = {}
    if learns:
        fitted, learned = _learned(
            model, stored, fitted, recipe, format, texts, seed, progress, saved
        )
    fitted.fuse_ends(model)
    blocks = model.get_submodule(adapter.block_path)
    dtype = model.dtype
    bar = tqdm(list(enumerate(blocks)), "quantize", unit="block", disable=not progress)
    executor = Executor(
        model, fitted, recipe, format, windows, seed, _teller(bar), bar.set_postfix_str
    )
    packed, matrices, clips = {}, {}, {}
    report = {"training": learned, "rounding": {}, "scales": {}, "blocks": {}}
    for index, block in bar:
        if stored:
            stored.load(f"{adapter.block_path}.{index}")
        state = saved.load(f"block-{index:04d}")
        if state is None:
            finished = executor.run(block.float(), index)
            saved.save(f"block-{index:04d}", finished.state())
        else:
            finished = FinishedBlock.of_state(state, format.weight, fitted.maps, model.device)
            executor.replay(block.float(), index, finished)
        path = f"{adapter.block_path}.{index}"
        clips.update((f"{path}.{name}", clip) for name, clip in finished.flat.clips.items())
        matrices[index] = fitted.learned_matrices(index) | finished.flat.online(adapter)
        # Aside until the end, for what is calibrated needs the device's memory.
        packed.update((f"{path}.{name}", w.to("cpu")) for name, w in finished.packed.items())
        for kind in ("rounding", "scales"):
            report[kind].update((f"{index}.{k}", v) for k, v in finished.report[kind].items())
        report["blocks"][str(index)] = finished.report["block"]
        block.to(dtype)
    if format.head is not None:
        weight = model.get_output_embeddings().weight.float()
        packed[adapter.head], _ = RTN().round(weight, format.head)
    made = made_from(model.config, recipe)
    if windows is not None and calibration is not None:
        made["calibration_text"] = "TEXT" if isinstance(calibration, str) else "WINDOWS"
    swap(model, adapter, _config(recipe, format, fitted, seed, windows, clips, made, report))
    for name, weight in packed.items():
        model.get_submodule(name).assign(weight.to(model.device))
    for index, block in enumerate(blocks):
        for name, learned in matrices[index].items():
            if name != adapter.attention or format.kv is not None:
                block.get_submodule(name).rotation.assign(learned)
    return attach(model)


def _fit_of(
    recipe: Recipe,
    fitted: FittedTransforms,
    format: QuantFormat,
    seed: int,
    windows: tuple[Tensor | None, ...],
    model: nn.Module,
    stored: StoredModel | None,
) -> dict[str, str]:
    """All that the bits of the result depend on, but for what computes them."""
    parts = (recipe.rounding, recipe.training, *recipe.transforms)
    parts += tuple(scale.fit for scale in recipe.scales)
    weights = stored.read(sorted(stored.files)) if stored else model.named_parameters()
    return {
        "lowbit": str(installed_version("lowbit")),
        "recipe": recipe.name,
        "parts": " ".join(type(part).__name__ for part in parts),
        **{name: str(value) for name, value in settings_of(recipe).items()},
        "transforms": ", ".join(fitted.report()) or "none",
        "format": format.name,
        "seed": str(seed),
        "windows": fingerprint(w for w in windows if w is not None),
        "weights": fingerprint(tensor for _, tensor in weights),
        "dtype": str(model.dtype),
    }


def _learned(
    model: PreTrainedModel,
    stored: StoredModel | None,
    fitted: FittedTransforms,
    recipe: Recipe,
    format: QuantFormat,
    texts: Tensor,
    seed: int,
    progress: bool,
    saved: Progress,
) -> tuple[FittedTransforms, dict]:
    """The transforms with what is learned of them, and a report; from `saved` if it has it."""
    state = saved.load("learned")
    if state is not None:
        found = {s: r.restored(state["matrices"][s]) for s, r in fitted.learned.items()}
        return fitted.with_learned(found), state["report"]
    if stored:
        stored.load("")
    fitted, report = recipe.training.learn(
        model, fitted, format, recipe.clips(format), texts, seed, progress, saved
    )
    matrices = {space: rotation.matrices() for space, rotation in fitted.learned.items()}
    saved.save("learned", {"matrices": matrices, "report": report})
    return fitted, report


def _teller(bar: tqdm) -> Callable[[str], None]:
    return parallel.by_first(lambda message: bar.write(message, file=sys.stderr))


def _useful(transforms: tuple, adapter: Adapter, format: QuantFormat) -> tuple:
    """The transforms, less those that only serve quantized linears where there are none: scales,
    and what would run online in front of them."""
    if format.weight is not None:
        return transforms
    spaces = adapter.spaces
    return tuple(
        t
        for t in transforms
        if isinstance(t, FoldNorms)
        or isinstance(t, Rotate | LearnRotation)
        and all(spaces[s].writers or not spaces[s].readers for s in adapter.each(t.space))
    )


def _config(
    recipe: Recipe,
    format: QuantFormat,
    fitted: FittedTransforms,
    seed: int,
    windows: Tensor | None,
    clips: dict[str, float],
    made: dict,
    found: dict,
) -> LowbitConfig:
    activation_clip, kv_clip = recipe.clips(format)
    return LowbitConfig(
        format=format,
        recipe=recipe.name,
        activation_clip=activation_clip,
        kv_clip=kv_clip,
        clips=clips,
        input_transforms=fitted.input_transforms,
        query_key_transform=fitted.query_key if format.kv else None,
        centred=fitted.fold_norms and fitted.adapter.layer_norms,
        tensor_parallel=recipe.tensor_parallel,
        report={
            "lowbit": installed_version("lowbit"),
            **{name: value for name, value in made.items() if value},
            "source": recipe.source,
            "transforms": fitted.report(),
            "seed": seed,
            "calibration": None if windows is None else list(windows.shape),
            **{kind: {name: f for name, f in each.items() if f} for kind, each in found.items()},
        },
    )


def check_weights(
    model: nn.Module, stored: StoredModel | None, adapter: Adapter, format: QuantFormat
):
    """Every weight finite, every row length divisible as the weight format needs."""
    for name, tensor in stored.read(list(stored.files)) if stored else model.named_parameters():
        bad = sum(int((~rows.isfinite()).sum()) for rows in tensor.split(ROWS_AT_ONCE))
        if bad:
            raise InputError(f"weights must be finite, got {bad} NaN or inf in {name}")
    rows = []
    if format.weight is not None:
        block = model.get_submodule(adapter.block_path)[0]
        sizes = {name: block.get_submodule(name).in_features for name in adapter.linears}
        rows += [(name, K, format.weight) for name, K in sizes.items()]
    if format.head is not None:
        rows.append((adapter.head, model.get_output_embeddings().in_features, format.head))
    for name, K, weight in rows:
        try:
            weight.num_groups(K)
        except InputError as error:
            raise InputError(f"{format}: {name}: {error}") from None
        if K * weight.storage_bits % 8:
            raise InputError(
                f"{format}: {name}: a row must fill whole bytes, got {K} codes of "
                f"{weight.storage_bits} bits"
            )


def sample_windows(tokens: Tensor, calibration: Calibration, seed: int) -> Tensor:
    """Random windows int64 [samples, length] of a 1-D token tensor, as in GPTQ's protocol."""
    length = calibration.length
    if tokens.numel() < length:
        raise InputError(
            f"the calibration text is shorter than one window: expected at least {length} tokens, "
            f"got {tokens.numel()}"
        )
    generator = torch.Generator().manual_seed(seed)
    last = tokens.numel() - length
    starts = torch.randint(0, last + 1, (calibration.samples,), generator=generator)
    return tokens[starts[:, None] + torch.arange(length)]


def _windows(
    calibration: Tensor | str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    spec: Calibration,
    seed: int,
    vocabulary: int,
) -> Tensor:
    windows = _sampled(calibration, tokenizer, spec, seed)
    check_token_ids(windows, vocabulary, "calibration")
    return windows


def _sampled(
    calibration: Tensor | str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    spec: Calibration,
    seed: int,
) -> Tensor:
    if isinstance(calibration, Tensor):
        two = calibration.dim() == 2 and len(calibration) >= 1 and calibration.shape[1] >= 2
        if not two or calibration.dtype != torch.int64:
            raise InputError(
                "calibration must be int64 [samples, length], 1 sample and 2 tokens at least, got "
                f"{calibration.dtype} {tuple(calibration.shape)}"
            )
        return calibration
    if tokenizer is None:
        raise InputError("tokenizer must be given to calibrate a model object on a text, got None")
    text = manual_text("calibration") if calibration is None else calibration
    tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    return sample_windows(tokens, spec, seed)
