"""PackedModel: what a packed model does otherwise than its class: save_pretrained and push_to_hub
write a model card too, generate() decodes in CUDA graphs."""

import functools
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from transformers import CompileConfig, GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, StaticCache

from lowbit.model_card import CARD_FILE, write_card
from lowbit.nn import StaticQuantKVCache
from lowbit.nn.graphs import GraphedForward, wants_graphs

# Options of save_pretrained(push_to_hub=True) that are push_to_hub's.
HUB_OPTIONS = ("repo_id", "commit_message", "private", "revision", "create_pr", "tags")


class PackedModel:
    """In front of a model's class."""

    plain: type[PreTrainedModel]

    def generate(self, inputs=None, generation_config: GenerationConfig | None = None, **kwargs):
        """transformers' generate with all its options; on a GPU in graphs (lowbit/nn/graphs.py).

        Then the cache has room for the longest answer from the start; disable_compile=True, or a
        cache of the caller's choice, keeps it from that.
        """
        if wants_graphs(self, generation_config, kwargs):
            kwargs["cache_implementation"] = "static"
            config = generation_config or self.generation_config
            if kwargs.get("compile_config", getattr(config, "compile_config", None)) is None:
                # transformers makes no cache smaller than the largest before, for what it compiled;
                # graphs are recorded anew.
                self._previous_max_cache_length = -1
        return super().generate(inputs, generation_config, **kwargs)

    def get_compiled_call(self, compile_config: CompileConfig | None):
        """What generate() decodes by with a cache of fixed size: graphs, unless a compile_config
        asks for torch.compile."""
        if compile_config is None and self.lowbit_config.format.kv is not None:
            return GraphedForward(self)
        return super().get_compiled_call(compile_config)

    def _prepare_static_cache(self, *args, **kwargs) -> Cache:
        """generate()'s cache of fixed size. transformers' keeps no more than the sliding window of
        layers that have one, and then no longer knows what length was asked for."""
        kv = self.lowbit_config.format.kv
        if kv is not None and kwargs.get("prefill_chunk_size") is not None:
            kwargs["prefill_chunk_size"] = None  # it would have room in full precision at once
        cache = super()._prepare_static_cache(*args, **kwargs)
        if kv is None or type(cache) is not StaticCache or cache.offloading:
            return cache
        lengths = [layer.max_cache_len for layer in cache.layers]
        length = max(*lengths, kwargs["max_cache_len"])
        return StaticQuantKVCache(self.config, kv, max_length=length)

    def save_pretrained(self, save_directory: str | Path, *args, push_to_hub=False, **kwargs):
        """transformers' save_pretrained with all its options, and README.md, the model card."""
        hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        super().save_pretrained(save_directory, *args, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        folder = Path(save_directory)
        write_card(folder, self, tuple(hub.pop("tags", ())))
        if push_to_hub:
            repo_id = hub.pop("repo_id", folder.resolve().name)
            upload(folder, repo_id, token=kwargs.get("token"), **hub)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        max_shard_size: int | str = "5GB",
        tags: list[str] | str = (),
        **options,
    ):
        """Upload what save_pretrained writes, the card included; returns huggingface_hub's answer.
        options: `upload`'s.

        A card that the repository has already stays as it is there. The tokenizer is pushed by its
        own push_to_hub.
        """
        tags = (tags,) if isinstance(tags, str) else tuple(tags)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            write_card(Path(folder), self, tags)
            return upload(Path(folder), repo_id, **options)

    def __reduce_ex__(self, protocol):
        """The class is made at run time: pickle and copy find it by the one it is made of."""
        return _empty, (self.plain,), self.__getstate__()


@functools.cache
def packed_class(plain: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """`plain` with PackedModel in front and under its name, which goes into config.json."""
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "plain": plain}
    return type(plain.__name__, (PackedModel, plain), {**names, "__doc__": plain.__doc__})


def _empty(plain: type[PreTrainedModel]) -> PreTrainedModel:
    kind = packed_class(plain)
    return kind.__new__(kind)


def upload(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
):
    """All of a folder to a model repository of the hub, which is made where there is none."""
    api = HfApi(token=token, library_name="lowbit")
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    has_card = api.file_exists(repo_id, CARD_FILE, revision=revision)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message or "Upload model",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
        ignore_patterns=[CARD_FILE] if has_card else None,
    )
