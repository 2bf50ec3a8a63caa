"""The command line, `lowbit COMMAND`: parser() has them all.

A user's mistake is one line on stderr and exit code 2. With --json, stdout carries one object and
nothing else; progress goes to stderr.
"""

import argparse
import contextlib
import ctypes
import json
import math
import sys
import warnings

import huggingface_hub
import transformers

from lowbit import commands, commands_evaluation, commands_report, demo, parallel
from lowbit.commands_evaluation import KINDS, TABLE_FORMATS, TABLE_RECIPES, TABLE_WINDOWS
from lowbit.doctor import installed_version
from lowbit.errors import InputError
from lowbit.evaluate.named_text import TEXTS_HELP
from lowbit.evaluate.perplexity import WINDOW
from lowbit.evaluate.zero_shot import AUTO, GROUPS
from lowbit.interop.export import WRITERS
from lowbit.models.source import PACKAGED
from lowbit.nn.attention import PREFILL_KV, QUANTIZED
from lowbit.nn.decode import DECODE_ROWS
from lowbit.ops.dispatch import BACKENDS, NoBackendError
from lowbit.recipes import RECIPES

USER_ERROR, INTERRUPTED = 2, 130
MODEL_HELP = f"a local folder, a hub name (owner/name) or {PACKAGED}"
SAVED_HELP = f"a folder that lowbit saved or can read, or a model: {MODEL_HELP}"
EXAMPLES = """examples:
  lowbit quantize smollm2-135m --recipe quarot --format w4a4kv4 -o smollm2-w4a4kv4
  lowbit eval smollm2-w4a4kv4 --text wikitext2 c4 --json
  lowbit generate smollm2-w4a4kv4 "The capital of France is"
"""


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line."""

    def error(self, message):
        print(f"lowbit: error: {one_line(message)} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(USER_ERROR)


def parser() -> Parser:
    """Every subcommand and option; `run` is the function of commands.py that does it."""
    formatter = argparse.RawDescriptionHelpFormatter
    top = Parser(
        prog="lowbit",
        description="Quantize a Hugging Face model, save it packed, and run what was saved.",
        epilog=EXAMPLES,
        formatter_class=formatter,
    )
    top.add_argument("--version", action="version", version=f"lowbit {installed_version('lowbit')}")
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, help: str) -> Parser:
        p = subparsers.add_parser(name, help=help, description=help)
        p.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        p.set_defaults(run=run)
        return p

    p = command("quantize", commands.run_quantize, "Quantize a model and save it packed.")
    p.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    p.add_argument("--recipe", default="quarot", help=f"one of {', '.join(RECIPES)}")
    p.add_argument("--format", default="w4a4kv4", help="e.g. w4a4kv4, w4a8kv4, w8a8, w4a16g128")
    _set_option(p)
    p.add_argument("-o", "--output", required=True, metavar="DIR", help="folder to write")
    p.add_argument(
        "--resume", metavar="DIR", help="where each finished part is saved, to go on after a kill"
    )
    p.add_argument("--overwrite", action="store_true", help="replace DIR if it is a model folder")
    _calibration_options(p)
    _model_options(p)

    p = command("eval", commands_evaluation.run_eval, "Perplexity of texts, and lm-eval's tasks.")
    p.add_argument("model", metavar="MODEL_OR_DIR", help=SAVED_HELP)
    _text_options(p)
    p.add_argument("--words", action="store_true", help="and lm-eval's word perplexity")
    _task_options(p)
    p.add_argument(
        "--out",
        metavar="FILE",
        help="append results; tasks that it has are not run again (default: "
        f"{commands_evaluation.RESULTS_FILE} in a folder that lowbit saved)",
    )
    p.add_argument("--fake", action="store_true", help="simulate in floating point, do not pack")
    _run_options(p)
    _prefill_options(p)
    _model_options(p)

    p = command("generate", commands.run_generate, "Continue a prompt.")
    p.add_argument("model", metavar="DIR", help=SAVED_HELP)
    p.add_argument("prompt", help="the text to continue")
    p.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default: 64")
    p.add_argument("--temperature", type=float, default=0.0, help="0 (default): no sampling")
    p.add_argument("--seed", type=int, default=0, help="of sampling")
    p.add_argument("--chat", action="store_true", help="the prompt is a user's turn in a chat")
    _run_options(p)
    _prefill_options(p)
    _model_options(p)

    p = command("serve", commands.run_serve, "An OpenAI-compatible server: `transformers serve`.")
    p.add_argument("model", metavar="DIR", help=SAVED_HELP)
    p.add_argument("--host", default="localhost", help="default: localhost")
    p.add_argument("--port", type=int, default=8000, help="default: 8000")
    p.add_argument("--device", default="auto", help="auto (default), cpu, cuda")

    p = command("export", commands.run_export, "Write a packed model for another tool to read.")
    p.add_argument("model", metavar="DIR", help="a folder that lowbit saved, or can read")
    p.add_argument(
        "--to", required=True, metavar="FORMAT", help=f"one of {', '.join(sorted(WRITERS))}"
    )
    p.add_argument("-o", "--output", required=True, metavar="DIR", help="folder to write")
    p.add_argument("--overwrite", action="store_true", help="replace DIR if it is a model folder")
    _dtype_option(p)

    p = command(
        "table",
        commands_evaluation.run_table,
        "Perplexity of recipes x formats, fake and packed; or a published table, run again.",
    )
    p.add_argument(
        "target",
        metavar="MODEL|SOURCE.TABLE",
        nargs="?",
        default=PACKAGED,
        help=f"{MODEL_HELP}; or a published table, such as 000.6 or 004.1",
    )
    p.add_argument("--recipe", nargs="+", help=f"default: {' '.join(TABLE_RECIPES)}")
    p.add_argument("--format", nargs="+", help=f"default: {' '.join(TABLE_FORMATS)}")
    p.add_argument(
        "--kind", nargs="+", choices=KINDS, help="of model (default: both; of published: packed)"
    )
    p.add_argument(
        "--out",
        metavar="FILE",
        help="append each row as it is measured; those that it has are not measured again",
    )
    _set_option(p)
    _text_options(p, "the Python manual; of a published table NAME=FILE, in its place")
    _calibration_options(p)
    _published_options(p)
    _model_options(p, dtype=False)

    p = command("recipes", commands.run_recipes, "The methods, and what each reproduces.")
    p.add_argument("recipe", metavar="RECIPE", nargs="*", help="to show whole (default: list all)")

    p = command("plot", commands.run_plot, "Draw a block's input activations before and after.")
    p.add_argument("model", metavar="MODEL", nargs="?", default=PACKAGED, help=MODEL_HELP)
    p.add_argument("-o", "--output", default="activations.png", metavar="FILE")
    p.add_argument("--recipe", default="quarot", help="its transforms are drawn, not its rounding")
    p.add_argument("--block", type=int, default=10, metavar="N", help="default: 10")
    p.add_argument("--tokens", type=int, default=128, metavar="N", help="default: 128")
    p.add_argument("--text", metavar="FILE", help="default: the Python manual")
    _model_options(p, dtype=False)

    p = command(
        "report", commands_report.run_report, "A page of all that is known of a checkpoint."
    )
    p.add_argument("model", metavar="DIR", help="a folder that lowbit saved")
    p.add_argument("-o", "--output", metavar="FILE", help="default: report.md in DIR")
    p.add_argument("--source", metavar="MODEL", help="what was quantized, to draw activations")
    p.add_argument("--block", type=int, metavar="N", help="to draw (default: the middle one)")
    p.add_argument("--speed", action="store_true", help="measure it here, of one prompt")
    _text_options(p, "none measured now")
    p.set_defaults(prefill_kv=QUANTIZED, prefill_chunk=None)  # as measured_on wants to know
    p.add_argument("--words", action="store_true", help="and lm-eval's word perplexity")
    _run_options(p)
    _model_options(p)

    p = command(
        "bench", commands.run_bench, "Time ops or models beside other kernels; needs a checkout."
    )
    p.add_argument(
        "op", metavar="OP", nargs="*", help="such as hadamard, or model (default: every op)"
    )
    p.add_argument("--shapes", nargs="+", metavar="MODEL", help="default: llama3-8b")
    p.add_argument("--M", nargs="+", type=int, metavar="N", help="rows of activations")
    p.add_argument("--context", nargs="+", type=int, metavar="N", help="tokens in the KV cache")
    p.add_argument("--backend", choices=BACKENDS, help="default: those that are no reference")
    p.add_argument("--device", help="cuda (default), or cpu to time the references on tiny shapes")
    p.add_argument("--csv", metavar="FILE", help="append the rows to FILE")
    p = p.add_argument_group("of lowbit bench model")
    p.add_argument("--format", nargs="+", help="to run beside bf16")
    p.add_argument("--prompt", nargs="+", type=int, metavar="N", help="tokens to read")
    p.add_argument("--batch", nargs="+", type=int, metavar="N", help="sequences that decode")
    p.add_argument("--layers", type=int, metavar="N", help="of the model (default: all)")
    p.add_argument("--no-compile", action="store_true", help="leave out bf16 by torch.compile")
    p.add_argument(
        "--overlap-launches", action="store_true", help="programmatic dependent launch, sm_90"
    )

    p = command("doctor", commands.run_doctor, "What this machine can run, and why not the rest.")
    p.add_argument("--kernels", action="store_true", help="list every CUDA kernel of the library")

    p = command("demo", demo.run, "Quantize SmolLM2-135M to w4a4kv4, run it, compare.")
    p.add_argument("-o", "--output", default="out/smollm2-135m-w4a4kv4", metavar="DIR")
    p.add_argument("--limit", type=int, default=2, metavar="N", help="windows (default: 2)")
    return top


def _model_options(p: Parser, dtype: bool = True):
    if dtype:
        _dtype_option(p)
    p.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    p.add_argument(
        "--trust-remote-code", action="store_true", help="let the model's repository run its code"
    )


def _run_options(p: Parser):
    p.add_argument("--backend", choices=BACKENDS, help="of every op (default: the first that can)")
    p.add_argument(
        "--decode",
        metavar="FORMAT",
        help="such as w4a16: the weights of a packed model with inputs that are not quantized, for "
        "few rows (default: its own format for all)",
    )
    p.add_argument(
        "--decode-rows",
        type=int,
        metavar="N",
        help=f"how few: tokens of a forward, all sequences together (default: {DECODE_ROWS})",
    )


def _prefill_options(p: Parser):
    p.add_argument(
        "--prefill-kv",
        choices=PREFILL_KV,
        default=QUANTIZED,
        help="what tokens of a prompt see of each other: quantized (default), what the cache holds "
        "of them, or full, K and V in the model's dtype",
    )
    p.add_argument(
        "--prefill-chunk",
        type=int,
        metavar="N",
        help="so many tokens at a time, over the cache of those before (default: all at once)",
    )


def _dtype_option(p: Parser):
    dtypes = ("auto", "float32", "bfloat16", "float16")
    p.add_argument(
        "--dtype", choices=dtypes, default="auto", help="auto (default): as the model was saved"
    )


def _set_option(p: Parser):
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change the recipe, e.g. rounding.damp=0.05 (fields: lowbit recipes NAME)",
    )


def _text_options(p: Parser, default: str = "the Python manual"):
    p.add_argument("--text", metavar="TEXT", nargs="+", help=f"{TEXTS_HELP} (default: {default})")
    p.add_argument(
        "--window", type=int, default=WINDOW, metavar="N", help=f"tokens (default: {WINDOW})"
    )
    p.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help=f"take N windows, spread evenly (default: all; of a table: {TABLE_WINDOWS})",
    )


def _published_options(p: Parser):
    p = p.add_argument_group("of a published table")
    p.add_argument(
        "--model",
        metavar="MODEL",
        help=f"a model of the table (default: its first), or one to hold against it: {MODEL_HELP}",
    )
    p.add_argument("--of", metavar="NAME", help="the table's model to hold MODEL against")
    p.add_argument(
        "--rows", nargs="+", metavar="ROW", help="methods, recipes, formats as w4a4 (default: all)"
    )
    p.add_argument("--metrics", nargs="+", metavar="METRIC", help="default: all of the table")
    _how_tasks_run(p)


def _task_options(p: Parser):
    p.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help=f"of lm-eval, or {' or '.join(GROUPS)}: those of the published tables",
    )
    _how_tasks_run(p)


def _how_tasks_run(p):
    p.add_argument("--task-path", metavar="DIR", help="of further tasks, as lm-eval's YAML files")
    p.add_argument("--batch-size", default=AUTO, metavar="N", help=f"of tasks (default: {AUTO})")
    p.add_argument("--items", type=int, metavar="N", help="of each task (default: all)")


def _calibration_options(p: Parser):
    p.add_argument("--calibration", metavar="FILE", help="text (default: the Python manual)")
    p.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="calibration windows (default: the recipe's; of a table: 128)",
    )
    p.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="tokens in each (default: the recipe's; of a table: 2048)",
    )
    p.add_argument("--seed", type=int, default=0, help="of rotations and calibration windows")


def one_line(message: object) -> str:
    return " ".join(str(message).split())


def finite(value):
    """JSON has no nan and no inf: they become null."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def keep_memory():
    """Tell glibc to keep freed blocks: it returns large ones to the system at every forward
    otherwise, and faulting them in again takes as long as the arithmetic on a CPU."""
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another libc: nothing to set
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    keep_memory()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    # What a library prints must not reach the stdout of a program that reads JSON there.
    stdout = contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext()
    try:
        with stdout:
            result, text = args.run(args)
        if parallel.rank() == 0:
            print(json.dumps(finite(result), indent=2, allow_nan=False) if args.json else text)
    except (InputError, NoBackendError, OSError) as error:
        which = f" in process {parallel.rank()}" if parallel.rank() else ""
        print(f"lowbit: error{which}: {one_line(error)}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("lowbit: interrupted", file=sys.stderr)
        return INTERRUPTED
    finally:
        parallel.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
