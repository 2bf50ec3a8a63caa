"""What the subcommands of `lowbit` do; each returns (object for --json, text for people)."""

import importlib
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer
from transformers.utils import import_utils

from lowbit import checkpoint, doctor, parallel
from lowbit.errors import InputError
from lowbit.evaluate import plot, published
from lowbit.evaluate.perplexity import check_prefill_chunk
from lowbit.evaluate.size import Size, folder_bytes, size_of
from lowbit.evaluate.text import manual_text, read_text, tokenize
from lowbit.files import check_target
from lowbit.formats import QuantFormat
from lowbit.interop.export import export
from lowbit.models.source import load_source, open_source, quant_method, resolve
from lowbit.models.stored import StoredModel
from lowbit.nn import set_prefill_kv
from lowbit.quantize import quantize
from lowbit.recipes import (
    RECIPES,
    Calibration,
    overridden,
    recipe_named,
    settings_of,
)

Result = tuple[dict, str]


def device_of(args) -> torch.device:
    """--device, or CUDA where there is one, else the CPU."""
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device must be 'cpu' or 'cuda', got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda' is not available: see `lowbit doctor`")
    return device


def dtype_of(args) -> torch.dtype | None:
    """--dtype; None (auto) stands for the dtype of the checkpoint."""
    return None if args.dtype == "auto" else getattr(torch, args.dtype)


def open_model(args, tensor_parallel: bool = False):
    """(model, tokenizer) of MODEL_OR_DIR: a quantized checkpoint or a full-precision model."""
    if quant_method(args.model) is None:
        if args.decode is not None:
            raise InputError(f"--decode needs a packed model, got {args.model!r} in full precision")
        model, tokenizer = load_source(args.model, dtype_of(args), args.trust_remote_code)
        checkpoint.check_tokenizer(model, tokenizer)
        return model.to(device_of(args)), tokenizer
    model = checkpoint.load(
        args.model,
        args.backend,
        dtype_of(args),
        device_of(args),
        decode=args.decode,
        decode_rows=args.decode_rows,
        tensor_parallel=tensor_parallel,
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(Path(args.model).expanduser())
    except (OSError, ValueError) as error:
        raise InputError(
            f"checkpoint {args.model!r} must hold a tokenizer, got none: pass one to lowbit.save"
        ) from error
    checkpoint.check_tokenizer(model, tokenizer)
    return model, tokenizer


def run_quantize(args) -> Result:
    recipe, format = overridden(recipe_named(args.recipe), args.set), QuantFormat.parse(args.format)
    recipe = replace(recipe, calibration=calibration_of(args, recipe.calibration))
    device = device_of(args)
    parallel.start(device)
    # before minutes of work, and again before renaming
    parallel.first(lambda: check_target(args.output, args.overwrite))
    text = read_text(args.calibration) if args.calibration else None
    source, tokenizer = open_source(args.model, dtype_of(args), args.trust_remote_code, device)
    model = source.model if isinstance(source, StoredModel) else source
    checkpoint.check_tokenizer(model, tokenizer)
    start = time.perf_counter()
    progress = parallel.rank() == 0
    model = quantize(source, recipe, format, text, tokenizer, args.seed, progress, args.resume)
    seconds = time.perf_counter() - start
    if text and "calibration_text" in model.lowbit_config.report:
        model.lowbit_config.report["calibration_text"] = Path(args.calibration).name

    def saved_bytes() -> int:
        checkpoint.save(model, args.output, tokenizer, args.overwrite)
        return folder_bytes(args.output)

    size, on_disk = size_of(model), parallel.first(saved_bytes)
    result = {
        "model": args.model,
        "output": args.output,
        "recipe": recipe.name,
        "format": format.name,
        "seconds": seconds,
        "bytes": {**asdict(size), "disk": on_disk},
        "report": model.lowbit_config.report,
    }
    text = f"{args.model}: {recipe.name}, {format}, {seconds:.0f} s, saved in {args.output}"
    return result, "\n".join([text, *transforms_text(model), size_text(size, on_disk)])


def calibration_of(args, default: Calibration) -> Calibration:
    """--samples and --length, each as in `default` where it is not given."""
    return Calibration(args.samples or default.samples, args.length or default.length)


def transforms_text(model) -> list[str]:
    """What was done to the model before its weights were rounded, a line each."""
    return [f"  {line}" for line in model.lowbit_config.report["transforms"]]


def size_text(size: Size, on_disk: int) -> str:
    """Three lines for people."""
    rows = [
        ("linears", size.linears, size.linears_bf16),
        ("whole model", size.model, size.model_bf16),
        ("on disk", on_disk, size.model_bf16),
    ]
    return "\n".join(
        f"  {name:<12} {packed / 1e6:8.1f} MB   bf16 {bf16 / 1e6:8.1f} MB   "
        + (f"{packed / bf16:.3f}x" if bf16 else "-")
        for name, packed, bf16 in rows
    )


class TokenBar:
    """A transformers streamer that counts generated tokens on stderr."""

    def __init__(self, total: int):
        self.bar = tqdm(total=total, desc="generate", unit="token")
        self.prompt_seen = False

    def put(self, tokens):
        if self.prompt_seen:
            self.bar.update(tokens.numel())
        self.prompt_seen = True

    def end(self):
        self.bar.close()


def prompt_ids(tokenizer, prompt: str, chat: bool) -> torch.Tensor:
    """Token ids [1, n] of a prompt, as one turn of a chat if asked for."""
    if chat:
        turn = [{"role": "user", "content": prompt}]
        try:
            prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        except ValueError as error:
            raise InputError("--chat needs a tokenizer with a chat template, got none") from error
    encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat, verbose=False)
    if encoded.input_ids.numel() == 0:
        raise InputError("prompt must hold at least one token, got an empty one")
    return encoded.input_ids.long()


def generate_text(
    model,
    tokenizer,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.0,
    chat: bool = False,
    prefill_chunk: int | None = None,
) -> tuple[str, int]:
    """(completion, number of new tokens); temperature 0 takes the most likely token each time."""
    if max_new_tokens < 1 or temperature < 0:
        raise InputError(
            "max_new_tokens must be at least 1 and temperature at least 0, got "
            f"{max_new_tokens} and {temperature}"
        )
    check_prefill_chunk(prefill_chunk)
    ids = prompt_ids(tokenizer, prompt, chat).to(model.device)
    room = model.config.max_position_embeddings - max_new_tokens
    if ids.shape[1] > room:
        raise InputError(
            f"prompt longer than the cache: expected at most {room} tokens (the model's "
            f"{model.config.max_position_embeddings} less {max_new_tokens} new ones), "
            f"got {ids.shape[1]}"
        )
    sampling = {"temperature": temperature} if temperature else {}
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        pad_token_id=tokenizer.eos_token_id,
        prefill_chunk_size=prefill_chunk,
        streamer=TokenBar(max_new_tokens),
        **sampling,
    )
    new = out[0, ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True), len(new)


def run_export(args) -> Result:
    check_target(args.output, args.overwrite)
    if quant_method(args.model) is None:
        raise InputError(f"export needs a folder with a quantized model, got {args.model!r}")
    model = checkpoint.load(args.model, dtype=dtype_of(args))
    try:
        tokenizer = AutoTokenizer.from_pretrained(Path(args.model).expanduser())
    except (OSError, ValueError):
        tokenizer = None
    export(model, args.output, args.to, tokenizer, args.overwrite)
    format = model.lowbit_config.format.name
    result = {"model": args.model, "output": args.output, "to": args.to, "format": format}
    result["bytes"] = folder_bytes(args.output)
    return result, f"{args.model}: {format}, written as {args.to} in {args.output}"


def run_generate(args) -> Result:
    model, tokenizer = open_model(args, tensor_parallel=True)
    set_prefill_kv(model, args.prefill_kv)
    torch.manual_seed(args.seed)  # the same in each process that has a share of the model
    start = time.perf_counter()
    completion, new_tokens = generate_text(
        model,
        tokenizer,
        args.prompt,
        args.max_new_tokens,
        args.temperature,
        args.chat,
        args.prefill_chunk,
    )
    result = {
        "model": args.model,
        "prompt": args.prompt,
        "completion": completion,
        "new_tokens": new_tokens,
        "seconds": time.perf_counter() - start,
    }
    return result, completion if args.chat else args.prompt + completion


def run_serve(args) -> Result:
    """transformers' own server, in a process that knows lowbit checkpoints."""
    folder = resolve(args.model)
    if not import_utils.is_serve_available():
        raise InputError("serve needs packages: pip install 'transformers[serving]'")
    from transformers.cli.transformers import app  # only here: it imports much

    options = {"host": args.host, "port": args.port, "device": args.device}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    app(["serve", folder, *words], prog_name="lowbit", standalone_mode=False)
    return {"model": args.model}, ""


def run_recipes(args) -> Result:
    recipes = [recipe_named(name) for name in args.recipe or RECIPES]
    line = published.whole_text if args.recipe else published.text
    found = [{**published.summary(r), "fields": settings_of(r)} for r in recipes]
    return {"recipes": found}, "\n".join(line(recipe) for recipe in recipes)


def run_plot(args) -> Result:
    recipe_named(args.recipe)
    text = read_text(args.text) if args.text else manual_text("evaluation")
    model, tokenizer = load_source(args.model, torch.float32, args.trust_remote_code)
    tokens = tokenize(tokenizer, text)[None, : args.tokens].to(device_of(args))
    inputs = plot.before_and_after(model.to(tokens.device), tokens, args.recipe, args.block)
    Path(args.output).expanduser().parent.mkdir(parents=True, exist_ok=True)
    title = f"{args.model}, block {args.block}: inputs before and after {args.recipe}"
    plot.draw(inputs, title, Path(args.output).expanduser())
    kurtosis = {name: [plot.kurtosis(x) for x in pair] for name, pair in inputs.items()}
    lines = [
        f"  {name:<18} kurtosis {before:8.1f} before, {after:5.1f} after"
        for name, (before, after) in kurtosis.items()
    ]
    result = {"model": args.model, "output": args.output, "kurtosis_before_after": kurtosis}
    return result, "\n".join([f"drawn to {args.output}", *lines])


def run_bench(args) -> Result:
    """The benchmarks lie in the repository beside this package and are not installed with it."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks/run.py").is_file():
        raise InputError("lowbit bench needs a checkout of the repository: benchmarks/ is not here")
    sys.path.insert(0, str(root))
    return importlib.import_module("benchmarks.run").run(args)


def run_doctor(args) -> Result:
    result = doctor.report(args.kernels)
    return result, doctor.text(result)
