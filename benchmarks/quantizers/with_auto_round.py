"""auto-round: AutoRound and AWQ, in fp32 and without torch.compile."""

import logging

from auto_round import AutoRound
from auto_round.algorithms.quantization.rtn.config import RTNConfig
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.algorithms.transforms.awq.config import AWQConfig
from job import Job, Refused, Stopwatch, Tensor, Tensors, block_tensors, load_model, run
from transformers import AutoTokenizer


def quantize(job: Job, windows: Tensor) -> tuple[Tensors, str, float]:
    logging.disable(logging.INFO)
    algorithm, settings = _algorithm(job)
    model = load_model(job)
    watch = Stopwatch()
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job.model),
        scheme="W4A16",
        bits=job.bits,
        group_size=job.group_size,
        sym=job.symmetric,
        dataset=list(windows.split(1)),
        seqlen=windows.shape[1],
        nsamples=len(windows),
        batch_size=job.options.get("batch", 8),
        device_map="cpu",
        enable_torch_compile=False,
        low_cpu_mem_usage=False,
        amp=False,
        seed=job.seed,
        alg_configs=algorithm,
    )
    model, _ = rounder.quantize()
    return block_tensors(model), settings, watch.seconds


def _algorithm(job: Job):
    """What AutoRound takes as alg_configs, and its settings in words."""
    options = job.options
    if job.method == "rtn":
        return RTNConfig(disable_opt_rtn=True), "disable_opt_rtn"
    if job.method == "autoround":
        config = SignRoundConfig(iters=options["steps"], lr=1 / options["steps"])
        return config, (
            f"iters {options['steps']}, batch {options['batch']}, lr and minmax_lr 1 / iters, "
            "enable_quanted_input, amp off"
        )
    if job.method in ("awq", "awq-clip"):
        duo, clip = options["duo_scaling"], job.method == "awq-clip"
        config = AWQConfig(n_grid=options["steps"], duo_scaling=duo, apply_clip=clip)
        return [config, RTNConfig(disable_opt_rtn=True)], (
            f"n_grid {options['steps']}, duo_scaling {duo}, apply_clip {clip}"
        )
    raise Refused(f"has no {job.method}")


run("auto-round", quantize)
