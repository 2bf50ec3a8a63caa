"""What the subcommands that measure accuracy do: eval and table; as in lowbit/commands.py."""

import difflib
import hashlib
import os
import re
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from lowbit.commands import Result, calibration_of, device_of, open_model
from lowbit.config import QUANT_METHOD
from lowbit.doctor import installed_version
from lowbit.errors import InputError
from lowbit.evaluate import reproduce, table, zero_shot
from lowbit.evaluate.fake_quant import to_fake
from lowbit.evaluate.ledger import Ledger
from lowbit.evaluate.lines import Lines
from lowbit.evaluate.named_text import MANUAL, MANUAL_WORD, Text, open_text, stand_ins
from lowbit.evaluate.perplexity import check_prefill_chunk, perplexity
from lowbit.evaluate.published_rows import CHECKPOINTS, PublishedRow, chosen, model_of, rows_of
from lowbit.evaluate.rows import Row
from lowbit.evaluate.text import manual_text, read_text, tokenize
from lowbit.evaluate.word_perplexity import word_perplexity
from lowbit.formats import QuantFormat
from lowbit.models.source import load_source, open_source, quant_method
from lowbit.nn import set_prefill_kv
from lowbit.nn.attention import QUANTIZED
from lowbit.progress import fingerprint
from lowbit.quantize import quantize, sample_windows
from lowbit.recipes import Calibration, overridden_where_known, recipe_named

RESULTS_FILE = "evaluation.jsonl"  # in the folder of a checkpoint: what was measured of it
KINDS = ("packed", "fake")
TABLE_RECIPES, TABLE_FORMATS = ("rtn", "quarot-rtn", "quarot"), ("w4a4kv4", "w4a8kv4")
TABLE_WINDOWS = 10
PUBLISHED_TABLE = re.compile(r"\d{3}\..*")  # "000.6"
IDENTITY_NUMBERS = 4096  # of each tensor, to tell one model from another


def run_eval(args) -> Result:
    manager = asked = None
    check_prefill_chunk(args.prefill_chunk)
    if args.tasks and args.prefill_chunk:
        raise InputError("--prefill-chunk is of texts, and must not be given with --tasks")
    if args.tasks:  # what can be wrong with the input is said before the model is loaded
        manager = zero_shot.task_manager(args.tasks, args.task_path)
        asked = zero_shot.asked_for(args.tasks, manager)
    names = args.text or (() if args.tasks else (MANUAL_WORD,))
    texts = [open_text(name) for name in names]
    model, tokenizer = open_model(args)
    config = getattr(model, "lowbit_config", None)
    set_prefill_kv(model, args.prefill_kv)
    kind = "full precision" if config is None else "packed"
    if args.fake:
        if config is None:
            raise InputError("--fake needs a checkpoint written by lowbit, got a full model")
        model, kind = to_fake(model), "fake"
    result = {
        "model": args.model,
        "kind": kind,
        "recipe": config and config.recipe,
        "format": config and config.format.name,
        "backend": args.backend,
        "decode": args.decode and model.lowbit_decode._asdict(),
        "prefill": prefill_of(args),
        "texts": [],
    }
    lines, of = results_of(args), {"model": identity_of(model), **conditions_of(args, model, kind)}
    for text in texts:
        result["texts"].append(measured_on(model, tokenizer, text, kind, args))
        lines.append({"of": of, **result["texts"][-1]})
    name = f"{kind} {config.recipe} {config.format}" if config else kind
    name += f", {prefill_of(args)}" if prefill_of(args) else ""
    people = [_text_line(found, name, model, args.prefill_chunk) for found in result["texts"]]
    if asked:
        batch = zero_shot.batch_size_of(args.batch_size, model.device)
        found = zero_shot.evaluate(model, tokenizer, asked, manager, batch, args.items, lines, of)
        result["tasks"] = found
        result["averages"] = {
            group: zero_shot.averages(found, zero_shot.GROUPS[group]) for group in asked.groups
        }
        people.append(zero_shot.table(found, asked.groups))
    return result, "\n".join(people)


def results_of(args) -> Lines:
    """Where results are kept: --out, else in the folder of a checkpoint that lowbit saved."""
    if args.out:
        return Lines(Path(args.out).expanduser())
    if quant_method(args.model) != QUANT_METHOD:
        return Lines()
    path = Path(args.model).expanduser() / RESULTS_FILE
    return Lines(path if os.access(path.parent, os.W_OK) else None)


def identity_of(model) -> str:
    """Of the weights, wherever they lie: the first of each tensor's numbers."""
    return fingerprint(p.detach().flatten()[:IDENTITY_NUMBERS] for p in model.parameters())


def conditions_of(args, model, kind: str) -> dict[str, str]:
    """What else the numbers depend on."""
    prefill = prefill_of(args)
    config = getattr(model, "lowbit_config", None)
    conditions = {
        **({"prefill": prefill} if prefill else {}),
        "kind": kind,
        # Of the same weights, and of the cache alone, there may be several.
        "format": str(config and config.format),
        "backend": str(args.backend),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "lowbit": str(installed_version("lowbit")),
    }
    return conditions | ({"decode": str(model.lowbit_decode)} if args.decode else {})


def prefill_of(args) -> str:
    """How prompts were taken, where it was not all at once with quantized KV."""
    how = ["full KV"] if args.prefill_kv != QUANTIZED else []
    how += [f"{args.prefill_chunk} tokens at a time"] if args.prefill_chunk else []
    return ", ".join(how)


def measured_on(model, tokenizer, text: Text, kind: str, args) -> dict:
    """Of one text, as it stands in the results and in --json."""
    start = time.perf_counter()
    label = kind if len(args.text or ()) < 2 else f"{kind} {text.name}"
    tokens = text.tokens(tokenizer, args.window)
    found = perplexity(model, tokens, args.window, args.limit, label, args.prefill_chunk)
    measured = {
        "text": text.name,
        "window": found.window,
        "windows": len(found.window_nll),
        "tokens": found.tokens,
        "perplexity": found.perplexity,
        "standard_error": found.standard_error,
        "window_nll": found.window_nll,
    }
    if args.words:
        whole = word_perplexity(
            model, tokenizer, text.text, args.window, f"{label} words", args.prefill_chunk
        )
        measured["word_perplexity"] = whole
    return measured | {"seconds": time.perf_counter() - start}


def _text_line(found: dict, name: str, model, prefill_chunk: int | None) -> str:
    words, decode = found.get("word_perplexity"), getattr(model, "lowbit_decode", None)
    if decode is not None:
        forward = min(found["window"], prefill_chunk or found["window"])
        name += f", {decode}" + ("" if forward <= decode.rows else ": not these windows")
    return (
        f"perplexity {found['perplexity']:.4f} +- {found['standard_error']:.4f}   ({name}; "
        f"{found['windows']} windows of {found['window']} tokens of {found['text']})"
    ) + ("" if words is None else f"\nword perplexity {words:.4f}   ({name}; {found['text']})")


def run_table(args) -> Result:
    if PUBLISHED_TABLE.fullmatch(args.target):
        return run_published(args)
    only = [f"--{name}" for name in ("model", "of", "rows", "metrics") if getattr(args, name)]
    if only:
        raise InputError(
            f"{only[0]} is for a published table, as 000.6, got the model {args.target!r}"
        )
    for setting in args.set:
        if setting.startswith("calibration."):
            raise InputError(
                f"--samples and --length must say it for all rows, got --set {setting}"
            )
    alike = calibration_of(args, Calibration())
    recipes = overridden_where_known(
        [replace(recipe_named(name), calibration=alike) for name in args.recipe or TABLE_RECIPES],
        args.set,
    )
    formats = [QuantFormat.parse(name).name for name in args.format or TABLE_FORMATS]
    texts = [open_text(name) for name in args.text or (MANUAL_WORD,)]

    def load_model():
        model, _ = load_source(args.target, torch.float32, args.trust_remote_code)
        return model.to(device_of(args))

    _, tokenizer = load_source(args.target, torch.float32, args.trust_remote_code)
    calibration = read_text(args.calibration) if args.calibration else manual_text("calibration")
    windows = sample_windows(tokenize(tokenizer, calibration), alike, args.seed)
    protocol = table.Protocol(
        {text.name: text.tokens(tokenizer, args.window) for text in texts},
        args.window,
        TABLE_WINDOWS if args.limit is None else args.limit,
        tuple(args.kind or KINDS),
    )
    of = {"model": args.target, "seed": str(args.seed), "kind": str(list(protocol.kinds))}
    of |= {"window": str(protocol.window), "limit": str(protocol.limit)}
    of |= {name: fingerprint([tokens]) for name, tokens in protocol.texts.items()}
    out = args.out and Path(args.out).expanduser()
    ledger = Ledger(out, of | {"calibration": fingerprint([windows])})
    full, rows = table.table(
        load_model, protocol, recipes, formats, calibration, tokenizer, args.seed, _tell, ledger
    )
    return {"model": args.target, **table.as_json(full, rows)}, table.markdown(full, rows)


def _tell(row: Row):
    """A row as soon as there is one: a table takes hours, and may not come to its end."""
    found = ", ".join(f"{name} {result.measured:.3f}" for name, result in row.texts.items())
    print(f"{row.recipe} {row.format}: {found}; {row.cost.seconds:.0f} s", file=sys.stderr)


def run_published(args) -> Result:
    """Rows of a published table with the recipes that claim them."""
    for name in ("recipe", "format", "set"):
        if getattr(args, name):
            raise InputError(f"--{name} must not be given with a published table: its rows say it")
    rows = rows_of(args.target)
    model = args.model or CHECKPOINTS[rows[0].model]
    name, path, same = model_of(rows, model, args.of)
    rows = chosen([row for row in rows if row.model == name], args.rows or [])
    metrics = _metrics(rows, args.metrics)
    device = device_of(args)
    dtype = torch.float32 if device.type == "cpu" else None  # of the checkpoint
    calibration = read_text(args.calibration) if args.calibration else None
    fake, texts = args.kind == ["fake"], stand_ins(args.text or ())
    of = {"model": path, "seed": str(args.seed), "window": str(args.window)}
    of |= {"kind": "fake" if fake else "packed", "device": device.type}
    of |= {name: str(getattr(args, name)) for name in ("limit", "samples", "length", "calibration")}
    of |= {name: hashlib.sha256(text.text.encode()).hexdigest() for name, text in texts.items()}
    conditions = reproduce.Conditions(
        window=args.window,
        windows=args.limit,
        items=args.items,
        batch_size=zero_shot.batch_size_of(args.batch_size, device),
        task_path=args.task_path,
        fake=fake,
        texts=texts,
        lines=Lines(args.out and Path(args.out).expanduser()),
        of=of | {"items": str(args.items), "lowbit": str(installed_version("lowbit"))},
    )

    no_weights = []  # the reason, once there is one: the hub is not asked again for every row

    def opened(load, *more):
        if no_weights:
            raise InputError(no_weights[0])
        try:
            return load(path, dtype, args.trust_remote_code, *more)
        except InputError as error:
            no_weights.append(str(error))
            raise

    def make(row: PublishedRow):
        if row.is_full:
            full, tokenizer = opened(load_source)
            return full.to(device), tokenizer
        if row.recipe is None:
            raise InputError(f"{row.method} is not there: no recipe claims the row")
        recipe = replace(row.recipe, calibration=calibration_of(args, row.recipe.calibration))
        source, tokenizer = opened(open_source, device)
        return quantize(source, recipe, row.format, calibration, tokenizer, args.seed), tokenizer

    harness, found = reproduce.Harness(metrics, conditions), []
    for row in rows:
        wanted = tuple(metric for metric in row.metrics if metric in metrics)
        ours, why_not = harness.measure(row, wanted, partial(make, row))
        found.append((row, reproduce.figures(row, wanted, ours, why_not, harness.notes)))
        told = reproduce.markdown(found[-1:]).splitlines()[2:]  # hours may lie between two rows
        print("\n".join(told), file=sys.stderr, flush=True)
    note = _about(name, path, same, args)
    result = {"table": args.target, "model": name, "measured": path, "same_checkpoint": same}
    people = f"{note}\n\n{reproduce.markdown(found)}"
    return {**result, "conditions": conditions.of, "rows": reproduce.as_json(found)}, people


def _metrics(rows: list[PublishedRow], asked: list[str] | None) -> list[str]:
    known = list(dict.fromkeys(metric for row in rows for metric in row.metrics))
    for name in asked or ():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.0)[0]
            raise InputError(
                f"unknown metric {name!r}: expected some of {', '.join(known)}; "
                f"did you mean {near!r}?"
            )
    return [name for name in known if name in (asked or known)]


def _about(name: str, path: str, same: bool, args) -> str:
    """What the figures are of, and how far from the papers' conditions."""
    which = f"{name} ({path})" if same else f"{path}, a different checkpoint than {name}"
    text = f"calibrated on {args.calibration or MANUAL}, seed {args.seed}"
    sizes = [f"{v} {k}" for k, v in (("samples", args.samples), ("tokens", args.length)) if v]
    part = [f"{args.limit} windows of each text"] if args.limit is not None else []
    part += [f"{args.items} items of each task"] if args.items is not None else []
    return "; ".join([f"{args.target}: {which}", " of ".join([text, *sizes]), *part])
