"""Decoding without the host: a forward of one token a row as a CUDA graph, replayed.

generate() runs a model whose cache keeps its size through what get_compiled_call returns; of a
packed model that is a GraphedForward (lowbit/integrations/hub.py). A graph lives as long as its
generate(): recording one takes a forward's launches, compiling would take minutes.
"""

import warnings
from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput

from lowbit.errors import InputError
from lowbit.models import adapter_for
from lowbit.nn.attention import QuantAttention
from lowbit.nn.static_cache import StaticQuantKVCache

DEVICES = ("cuda",)  # that have graphs
# Options of generate() that choose a cache, or need one that forgets; disable_compile is for users
# who want launches.
CHOICES = (
    "past_key_values",
    "cache_implementation",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "disable_compile",
)
OF_CALLS = ("assistant_model", "custom_generate")  # the same, that no GenerationConfig has

Recorded = tuple[ModelOutput, Callable[[], None]]  # outputs, and what fills them anew


def wants_graphs(model: PreTrainedModel, config: GenerationConfig | None, options: dict) -> bool:
    """Whether generate(config, **options) should decode in graphs, with a cache of fixed size: on
    one GPU, with quantized KV, where the caller has chosen nothing else.

    Pads behind a row's tokens want the cache that grows. Which experts have tokens, the host has to
    know.
    """
    config = config or model.generation_config
    chosen = {name: options.get(name, getattr(config, name, None)) for name in CHOICES + OF_CALLS}
    use_cache = options.get("use_cache", getattr(config, "use_cache", None))
    attentions = [m for m in model.modules() if isinstance(m, QuantAttention)]
    return (
        not any(value is not None and value is not False for value in chosen.values())
        and use_cache is not False
        and {p.device.type for p in model.parameters()} <= set(DEVICES)
        and len({p.device for p in model.parameters()}) == 1
        and bool(attentions)
        and not adapter_for(model.config).experts
        and _pads_in_front(options.get("attention_mask"))
    )


def _pads_in_front(mask: Tensor | None) -> bool:
    return mask is None or mask.dim() != 2 or bool((mask[:, 1:] >= mask[:, :-1]).all())


class GraphedForward:
    """model(**inputs), to the same bits; of inputs that come again with one column, recorded.

    The first forward of a shape runs as it is, which loads and settles what is lazy; the second
    one is recorded. Results are copies.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.seen: dict[tuple, list] = {}  # with what a key names by id, which then stays its own
        self.steps: dict[tuple, _Step] = {}
        self.refused = False

    def __call__(self, **inputs) -> ModelOutput:
        cache, ids = inputs.get("past_key_values"), inputs.get("input_ids")
        is_step = isinstance(cache, StaticQuantKVCache) and ids is not None and ids.shape[1] == 1
        objects = []
        key = _key(inputs, objects)
        if not is_step or self.refused or key not in self.seen:
            self.seen[key] = objects
            return self.model(**inputs)
        if key not in self.steps:
            step = _Step(self.model, inputs)
            if step.why_not is not None:
                warnings.warn(
                    f"this model decodes launch by launch, as no CUDA graph could be recorded: "
                    f"{step.why_not}",
                    stacklevel=2,
                )
                self.refused = True
                return self.model(**inputs)
            self.steps[key] = step
        return self.steps[key].run(inputs)


class _Step:
    """One recorded forward, and the tensors it reads."""

    def __init__(self, model: PreTrainedModel, inputs: dict):
        self.cache = inputs["past_key_values"]
        self.inputs = _mapped(inputs, Tensor.clone)
        self.columns = int(self.cache.get_seq_length())  # the host waits here, and not again
        self.why_not = None
        try:
            self.outputs, self.replay = record(model, self.inputs)
        except RuntimeError as error:
            self.cache.table.open = None  # the forward was left half way; nothing of it has run
            cause = error.__context__ or error  # the end of a capture that failed fails too
            self.why_not = str(cause).strip().splitlines()[0]

    def run(self, inputs: dict) -> ModelOutput:
        # In a graph nothing checks, and a page that is not there would be the device's error.
        room = self.cache.table.max_length
        if self.columns >= room:
            raise InputError(
                f"prompt longer than the KV cache: its capacity is {room} tokens a sequence, got "
                f"{self.columns + 1}"
            )
        for own, new in zip(_tensors(self.inputs), _tensors(inputs), strict=True):
            own.copy_(new)
        self.replay()
        self.columns += 1
        return _mapped(self.outputs, Tensor.clone)


def record(model: PreTrainedModel, inputs: dict) -> Recorded:
    """A CUDA graph of model(**inputs), which does not run now.

    On a stream of the model's device, where another one may be current; a capture that fails would
    leave that stream current, but for the outer one. Other threads may go on allocating.
    """
    device = next(model.parameters()).device
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        stream = torch.cuda.Stream(device)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            outputs = model(**inputs)
    return outputs, graph.replay


def _key(value, objects: list) -> Hashable:
    """What a recorded forward depends on besides the numbers in its tensors, which may lie in dicts
    and tuples (a mask for each kind of layer). Others count as themselves: they join `objects`."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device
    if isinstance(value, dict):
        return tuple((name, _key(part, objects)) for name, part in sorted(value.items()))
    if isinstance(value, list | tuple):
        return tuple(_key(part, objects) for part in value)
    if isinstance(value, bool | int | float | str | None):
        return value
    objects.append(value)
    return id(value)


def _mapped(value, of: Callable[[Tensor], Tensor]):
    """The same dicts and tuples with other tensors in them."""
    if isinstance(value, Tensor):
        return of(value)
    if isinstance(value, dict):  # ModelOutput too
        return type(value)(**{name: _mapped(part, of) for name, part in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(_mapped(part, of) for part in value)
    return value


def _tensors(value) -> list[Tensor]:
    """Those of _mapped, in order of names."""
    if isinstance(value, dict):
        return [t for _, part in sorted(value.items()) for t in _tensors(part)]
    if isinstance(value, list | tuple):
        return [t for part in value for t in _tensors(part)]
    return [value] if isinstance(value, Tensor) else []
