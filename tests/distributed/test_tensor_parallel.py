"""Ranks that sample together from one model, each with a part of its weights: what they draw, what each holds, what they refuse."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    Olmo2Config,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.distributed import DistributedConfig as TransformersDistributedConfig

from fastppo.distributed import team_of_ranks
from fastppo.distributed_config import DistributedConfig
from fastppo.export import export_run
from fastppo.model import prepare_model
from fastppo.model.divided import local_part
from fastppo.model.sharding import Sharding, shard_network
from fastppo.model.tensor_parallel import SplitCopy, divided_parameters, require_divisible
from fastppo.rollout import Engine, Rollout, SamplingParams
from fastppo.run_folder import read_metrics
from tests.distributed.ranks import run_ranks
from tests.distributed.sharded import PROMPTS, Together
from tests.distributed.test_same_as_one import OF_THE_MACHINE
from tests.tiny import make_model, make_tokenizer, ppo_config
from tests.tiny_trainer import build_trainer
from tests.tolerance import assert_same_on_ranks

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 24, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None,
}  # fmt: skip
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
FAMILIES = {
    "llama": lambda: make_model(),
    "tied": lambda: make_model(tie_word_embeddings=True),
    "biased": lambda: make_model(attention_bias=True, mlp_bias=True),
    "qwen3": lambda: _made(Qwen3Config(**SMALL, head_dim=8)),
    "mixture": lambda: _made(Qwen3MoeConfig(**SMALL | MIXTURE, head_dim=8)),
    "gemma2": lambda: _made(Gemma2Config(**SMALL, head_dim=8, sliding_window=8)),
    "olmo2": lambda: _made(Olmo2Config(**SMALL)),
}
TIED = ["tied", "gemma2"]
WAYS = {"greedy": {"temperature": 0.0}, "drawn": {"temperature": 1.0, "n": 3}}


def _made(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def _samples(model: PreTrainedModel) -> dict[str, Rollout]:
    engine = Engine(model, max_batch_size=5)
    return {
        name: engine.generate(PROMPTS, SamplingParams(max_new_tokens=6, seed=3, **way)) for name, way in WAYS.items()
    }


def _same(ours: dict[str, Rollout], alone: dict[str, Rollout], what: str) -> None:
    for way, rollout in alone.items():
        assert torch.equal(ours[way].tokens, rollout.tokens), f"{what}, {way}"
        assert_same_on_ranks(ours[way].logprobs, rollout.logprobs, f"{what}, {way}")


def _mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def _sampled(family: str) -> dict[str, Any]:
    split = SplitCopy(prepare_model(FAMILIES[family]()), _mesh(), CPU)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in map(local_part, split.model.parameters())}
    heads = {shape.heads for shape in Engine(split.model).runner.look().shapes.values()}
    return {
        "samples": _samples(split.model),
        "heads": heads,
        "blocks": [storage.nbytes() for storage in storages.values()],
    }


def _loaded(folder: str) -> dict[str, Rollout]:
    """As a user loads a model that is larger than a device: each rank reads its part alone."""
    settings = TransformersDistributedConfig(tp_size=dist.get_world_size())
    return _samples(AutoModelForCausalLM.from_pretrained(folder, distributed_config=settings))


def _scaled(model: PreTrainedModel) -> None:
    """Another network."""
    with torch.no_grad():
        for parameter in model.parameters():
            local_part(parameter).mul_(1.5)


def _refreshed(family: str) -> dict[str, Any]:
    model = prepare_model(FAMILIES[family]())
    split = SplitCopy(model, _mesh(), CPU)
    with pytest.raises(ValueError, match="no rank has the whole weights with distributed.tensor_parallel"):
        split.state_dict()
    places = [local_part(p).data_ptr() for p in split.model.parameters()]
    shard_network(model, Sharding(_mesh()))
    _scaled(model)
    split.refresh(model)
    split.collect(model, keep=dist.get_rank() == 0)
    same = places == [local_part(p).data_ptr() for p in split.model.parameters()]
    return {
        "samples": _samples(split.model),
        "same places": same,
        "written": split.state_dict() if dist.get_rank() == 0 else None,
    }


def _refused() -> None:
    with pytest.raises(ValueError, match="is 2, expected a divisor of the number of processes, 3"):
        team_of_ranks(DistributedConfig(sharding="full", tensor_parallel=2), SimpleNamespace(size=3), CPU)
    model = prepare_model(FAMILIES["llama"]())
    model._tp_plan = model.tp_plan | {"model.layers.*.mlp.down_proj": "colwise"}
    with pytest.raises(ValueError, match="LlamaForCausalLM is not supported with distributed.tensor_parallel 2: "):
        SplitCopy(model, _mesh(), CPU)
    split = SplitCopy(prepare_model(FAMILIES["llama"]()), _mesh(), CPU)
    with pytest.raises(ValueError, match="is run by several ranks together, expected one alone"):
        Engine(split.model).open(SamplingParams())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("start")
    FAMILIES["llama"]().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def together(folder: Path) -> Together:
    calls: dict[str, tuple] = {family: (_sampled, family) for family in FAMILIES}
    calls |= {f"refreshed {family}": (_refreshed, family) for family in TIED}
    return Together({2: calls | {"loaded": (_loaded, str(folder)), "refused": (_refused,)}})


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_that_sample_together_draw_what_one_does(together: Together, family: str) -> None:
    """Each with half of the weights that the plan divides, in one block of memory, and half of the keys and values."""
    model = prepare_model(FAMILIES[family]())
    alone, told = _samples(model), together.run(2, family)
    for each in told:
        _same(each["samples"], alone, family)
    for way in WAYS:
        assert torch.equal(told[0]["samples"][way].logprobs, told[1]["samples"][way].logprobs)
    whole, divided = sum(p.numel() for p in model.parameters()), divided_parameters(model)
    for each in told:
        (block,) = each["blocks"]
        assert 0 <= block - 4 * (whole - divided + divided // 2) < 64 * len(list(model.parameters()))
    assert divided > 0.8 * (whole - model.get_input_embeddings().weight.numel())
    keys = 2 if family == "olmo2" else 1  # a norm over all heads needs them all on every rank
    assert all(each["heads"] == {keys} for each in told)


def test_a_model_that_transformers_has_divided_is_sampled_from(together: Together) -> None:
    alone = _samples(prepare_model(FAMILIES["llama"]()))
    for samples in together.run(2, "loaded"):
        _same(samples, alone, "loaded in parts")


@pytest.mark.parametrize("family", TIED)
def test_parts_follow_the_sharded_weights_in_their_place(together: Together, family: str) -> None:
    """Also where head and embedding are one, and the plan divides the head alone or both."""
    model = prepare_model(FAMILIES[family]())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    before = _samples(model)["drawn"].tokens
    _scaled(model)
    alone, told = _samples(model), together.run(2, f"refreshed {family}")
    assert not torch.equal(before, alone["drawn"].tokens)
    for each in told:
        assert each["same places"]
        _same(each["samples"], alone, "refreshed")
    written, expected = told[0]["written"], model.state_dict()
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], x) for name, x in expected.items())
    assert torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])


def test_what_cannot_be_divided_is_refused_by_name(together: Together, tmp_path: Path) -> None:
    together.run(2, "refused")
    small = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 24}
    for model, ranks, named in (
        (make_model(), 4, "LlamaForCausalLM's num_key_value_heads, 2"),
        (make_model(num_key_value_heads=4), 4, "LlamaForCausalLM's vocab_size, 18"),
        (
            make_model(hidden_size=36, num_attention_heads=3, num_key_value_heads=3),
            3,
            "64, a width of LlamaForCausalLM's model.layers.0.mlp.gate_proj",
        ),
        (GPT2LMHeadModel(GPT2Config(**small)), 2, "no tensor-parallel plan for GPT2LMHeadModel"),
    ):
        with pytest.raises(ValueError, match=f"distributed.tensor_parallel is {ranks}, expected .*{named}"):
            require_divisible(model, ranks)
    with pytest.raises(ValueError, match="tensor_parallel is 2, expected 1 with sharding none"):
        ppo_config(distributed__tensor_parallel=2)
    with pytest.raises(ValueError, match="distributed.tensor_parallel is 2, expected 1 with lora.r"):
        ppo_config(distributed__sharding="full", distributed__tensor_parallel=2, lora__r=2)
    with pytest.raises(ValueError, match="is 2, expected a divisor of the number of processes, 1"):
        build_trainer(tmp_path, distributed__sharding="full", distributed__tensor_parallel=2)


def _trained(folder: str, settings: dict[str, Any]) -> None:
    """Rates are such that a step moves the weights by far more than sums in another order do."""
    rates = {"optimizer__eps": 1e-3, "reward__kl_coef": 0.05, "total_steps": 2, "checkpoint__every": 1}
    rates |= {"evaluation__every": 1, "evaluation__keep_best": True, "evaluation__patience": None}
    model = make_model()
    model.name_or_path = str(Path(folder).with_name("start"))
    build_trainer(folder, model=model, eval_prompts=["ab", "cd", "e"], **rates | settings).train()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_run_whose_ranks_sample_together_is_that_of_one_process(tmp_path: Path, ranks: int) -> None:
    """Four ranks are two teams. What is written, also of the best step, is the model that one process writes."""
    start = tmp_path / "start"
    make_model().save_pretrained(start)
    make_tokenizer().save_pretrained(start)
    alone, ours = tmp_path / "alone", tmp_path / "ours"
    _trained(str(alone), {})
    run_ranks(ranks, _trained, str(ours), {"distributed__sharding": "full", "distributed__tensor_parallel": 2})
    rows = list(zip(read_metrics(ours), read_metrics(alone), strict=True))
    assert [mine["step"] for mine, _ in rows] == [0, 1, 2]
    for mine, theirs in rows:
        for name, value in theirs.items():
            if value is not None and not name.startswith(OF_THE_MACHINE):
                found, expected = (torch.tensor(x, dtype=torch.float64) for x in (mine[name], value))
                assert_same_on_ranks(found, expected, f"step {theirs['step']}, {name}")
    for name in ("model", "best"):
        written, expected = (dict(AutoModelForCausalLM.from_pretrained(x / name).state_dict()) for x in (ours, alone))
        assert written.keys() == expected.keys()
        for key, weight in expected.items():
            assert_same_on_ranks(written[key], weight, f"{name}, {key}")
            assert name == "best" or "norm" in key or not torch.equal(weight, make_model().state_dict()[key])
    exported = AutoModelForCausalLM.from_pretrained(export_run(ours, tmp_path / "exported")).state_dict()
    written = AutoModelForCausalLM.from_pretrained(ours / "model").state_dict()
    assert all(torch.equal(exported[key], weight) for key, weight in written.items())
