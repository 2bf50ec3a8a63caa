"""What test_tensor_parallel_processes.py has two processes do; see parallel_jobs.py.

python tensor_parallel_jobs.py FOLDER, where CASES lie as checkpoints.
"""

import sys
from pathlib import Path
from unittest.mock import patch

import torch
from models import tiny_config, tiny_llama, tiny_model, tiny_tokens
from parallel_jobs import main
from torch.distributed import init_device_mesh
from transformers import AutoModelForCausalLM, MixtralConfig, PhiConfig

import lowbit
from lowbit.errors import InputError
from lowbit.evaluate.fake_quant import to_fake
from lowbit.integrations import transformers
from lowbit.interop.export import export
from lowbit.nn.fused import packed_linears
from lowbit.nn.static_cache import StaticQuantKVCache
from lowbit.recipes import overridden, recipe_named

TOKENS, MASK = tiny_tokens(2, 20), torch.ones(2, 20, dtype=torch.int64)
MASK[0, :7] = 0
SIZES = {"intermediate_size": 128, "bias": True}


def mixtral():
    return tiny_model(tiny_config(MixtralConfig))


def phi():
    return tiny_model(tiny_config(PhiConfig))


# name -> (format, recipe, ranks that it is quantized for, model)
CASES = {
    "w4a4kv4": ("w4a4kv4", "quarot-rtn", 2, lambda: tiny_llama(**SIZES)),
    "w4a16kv4g32": ("w4a16kv4g32", "quarot-rtn", 2, lambda: tiny_llama(**SIZES)),
    "w8a8": ("w8a8", "quarot-rtn", 2, lambda: tiny_llama(**SIZES)),
    "two levels": ("w4a8kv4g32-wtwolevel", "rtn", 2, lambda: tiny_llama(**SIZES)),
    "experts": ("w4a4kv4", "quarot-rtn", 2, mixtral),
    "no gate": ("w4a4kv4", "quarot-rtn", 2, phi),
    "four ranks": ("w8a8", "quarot-rtn", 4, lambda: tiny_llama(**SIZES, num_kv_heads=4)),
    "one rank": ("w4a4kv4", "rtn", 1, tiny_llama),
    "one rank, rotated": ("w4a16", "quarot-rtn", 1, tiny_llama),
    "weights alone": ("w4a16g32", "rtn", 1, lambda: tiny_llama(**SIZES)),
    "one KV head": ("w4a16g32", "rtn", 1, lambda: tiny_llama(num_kv_heads=1)),
    "no weights": ("w16a16kv4", "rtn", 1, tiny_llama),
}
GPTQ = "weights alone, as gptq"
RUN = [*list(CASES)[:7], "weights alone", GPTQ]
REFUSED = ["one rank", "one rank, rotated", "one KV head", "no weights"]


def make(folder: Path):
    for name, (format, recipe, ranks, model) in CASES.items():
        recipe = overridden(recipe_named(recipe), [f"tensor_parallel={ranks}"])
        model = lowbit.quantize(model(), recipe, format, progress=False)
        lowbit.save(model, folder / name)
        if name == "weights alone":
            export(model, folder / GPTQ, "gptq")


def of_transformers(path: Path):
    return AutoModelForCausalLM.from_pretrained(path, tp_plan="auto")


# Ways to load a share of a model
WAYS = {
    "fused": lambda path: lowbit.load(path, tensor_parallel=True),
    "plain": lambda path: lowbit.load(
        path, fused=False, tensor_parallel=init_device_mesh("cpu", (2,))
    ),
    "transformers": of_transformers,
}


def ways_of(case: str) -> list[str]:
    if case == "w4a4kv4":
        return list(WAYS)
    return ["fused"] if case in ("four ranks", GPTQ) else ["fused", "transformers"]


@torch.no_grad()
def results(model) -> dict:
    generate = {"attention_mask": MASK, "max_new_tokens": 6, "do_sample": False}
    out = model(TOKENS)
    found = {"logits": out.logits, "generated": model.generate(TOKENS, **generate)}
    if kv := model.lowbit_config.format.kv:
        cache = StaticQuantKVCache(model.config, kv, max_length=32)
        found["static"] = model.generate(
            TOKENS, **generate, past_key_values=cache, disable_compile=True
        )
        found["kv bytes"] = out.past_key_values.nbytes
    linears = [linear for _, linear in packed_linears(model)]
    found["codes bytes"] = sum(linear.codes.nbytes for linear in linears)
    found["bytes"] = sum(linear.packed_weight.nbytes for linear in linears)
    return found


def run(folder: Path) -> dict:
    """case -> way -> results; the way of one process is "alone"."""
    found = {}
    for name in RUN:
        found[name] = {"alone": results(lowbit.load(folder / name))}
        for way in ways_of(name):
            found[name][way] = results(WAYS[way](folder / name))
    return found


def refused(folder: Path) -> list[str]:
    """Messages: of what is loaded, then of what is done with a share."""

    def message(do) -> str:
        try:
            do()
        except InputError as error:
            return str(error)

    def without_room():
        with patch.object(transformers, "free_bytes", lambda device: 1000):
            of_transformers(folder / "w8a8")

    share = WAYS["fused"](folder / "w8a8")
    return [
        *(message(lambda name=name: WAYS["fused"](folder / name)) for name in REFUSED),
        message(lambda: of_transformers(folder / "one rank")),
        message(without_room),
        message(lambda: lowbit.save(share, folder / "out")),
        message(lambda: share.save_pretrained(folder / "out")),
        message(lambda: export(share, folder / "out", "gptq")),
        message(lambda: to_fake(share)),
    ]


@torch.no_grad()
def mesh_of_one(folder: Path) -> bool:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "tensor"))["tensor"]
    path = folder / "weights alone"
    model = lowbit.load(path, tensor_parallel=mesh)
    return torch.equal(model(TOKENS).logits, lowbit.load(path)(TOKENS).logits)


if __name__ == "__main__":
    main(Path(sys.argv[1]), (run, refused, mesh_of_one))
