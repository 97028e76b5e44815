"""Models and tokenizers from a folder, and folders that hold none, or not the whole of one."""

from __future__ import annotations

import time

import httpx
import pytest
import torch
from huggingface_hub import constants as hub
from safetensors.torch import load_file, save_file

from fastppo.model import load_model, load_named_tokenizer, load_tokenizer, loading, prepare_model
from tests.rollout.tiny import FAMILIES, make_model


def test_round_trip(tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype="auto", device="cpu")
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert load_model(tmp_path, dtype="bfloat16", device="cpu").dtype == torch.bfloat16


def test_real_model_and_tokenizer(stories_model):
    model, tokenizer = load_model(stories_model, dtype=torch.float32, device="cpu"), load_tokenizer(stories_model)
    assert tokenizer.decode(tokenizer.encode("Once upon a time", add_special_tokens=False)) == "Once upon a time"
    prepare_model(model)


def test_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="model is '.*nowhere', expected a folder"):
        load_model(str(tmp_path / "nowhere"), dtype="auto", device="cpu")
    with pytest.raises(ValueError, match="tokenizer is './nowhere'"):
        load_tokenizer("./nowhere")


def test_what_it_is_called(tmp_path):
    with pytest.raises(ValueError, match="^model.name is '.*nowhere', expected a folder"):
        load_named_tokenizer(str(tmp_path / "nowhere"), None)
    with pytest.raises(ValueError, match="^model.tokenizer is './nowhere', expected a folder"):
        load_named_tokenizer(str(tmp_path), "./nowhere")
    with pytest.raises(ValueError, match=f"^the tokenizer of model.name '{tmp_path}' cannot be read from this folder"):
        load_named_tokenizer(str(tmp_path), None)
    for load in (load_tokenizer, lambda name: load_model(name, dtype="auto", device="cpu")):
        with pytest.raises(ValueError, match="is empty, expected a folder in Transformers' format or a hub name"):
            load("")


def test_a_hub_that_is_not_reached_is_asked_once(monkeypatch, tmp_path):
    """The libraries' own repetitions would take half a minute for each file, and minutes where nothing answers at all."""
    asked = []

    def send(self, request, **keywords):
        asked.append(request.url)
        raise httpx.ConnectError("no network")

    monkeypatch.setattr(httpx.Client, "send", send)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits to ask again"))
    with pytest.raises(
        ValueError, match="model 'nobody/nothing' cannot be found .*the hub cannot be reached: no network"
    ):
        load_model("nobody/nothing", dtype="auto", device="cpu")
    assert [url.path for url in asked if "agent" not in url.path] == ["/nobody/nothing/resolve/main/config.json"]


def test_what_the_hub_or_its_cache_has_is_left_to_transformers(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(loading, "get_hf_file_metadata", asked.append)
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", lambda name, **options: name)
    assert load_tokenizer("some/model") == "some/model" and len(asked) == 1
    (tmp_path / "models--some--model").mkdir()
    assert load_tokenizer("some/model") == "some/model" and len(asked) == 1


def test_folder_without_model(tmp_path):
    with pytest.raises(ValueError, match="model '.*' cannot be read from this folder"):
        load_model(str(tmp_path), dtype="auto", device="cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_lacks_what_it_saved(tmp_path, family):
    make_model(family).save_pretrained(tmp_path)
    load_model(tmp_path, dtype="auto", device="cpu")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("change", [lambda weight: None, lambda weight: weight[:1].clone()], ids=["lost", "cut"])
def test_weights_that_are_missing_are_named(tmp_path, tied, change):
    """Transformers would put random numbers in their place. Tied weights are stored once, which is not missing."""
    make_model("llama", tie_word_embeddings=tied).save_pretrained(tmp_path)
    load_model(str(tmp_path), dtype="auto", device="cpu")
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    changed = change(tensors.pop(name))
    save_file(
        tensors if changed is None else tensors | {name: changed}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=f"lacks weights.*: {name}$"):
        load_model(tmp_path, dtype="auto", device="cpu")


def test_broken_weights(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="cannot be read from this folder"):
        load_model(tmp_path, dtype="auto", device="cpu")


def test_unknown_dtype(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="dtype is 'float33'"):
        load_model(str(tmp_path), dtype="float33", device="cpu")
