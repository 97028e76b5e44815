"""LoRA adapters of policy, critic and reference on one trunk: the products, who speaks, what is written."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastppo import Engine, SamplingParams
from fastppo.lora_config import LoRAConfig
from fastppo.model import parts_trunk, prepare_model
from fastppo.model.adapters import Adapters, adapters_of, add_adapters
from fastppo.model.lora import merged
from fastppo.model.parts_trunk import trunk_of
from fastppo.roles import Roles
from fastppo.rollout import Rollout
from tests.rollout.tiny import make_model
from tests.tolerance import assert_as_exact_as_model, assert_rounds_to

peft = pytest.importorskip("peft")
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [3]]


def wrapped(family: str = "llama", name: str = "default", **settings) -> peft.PeftModel:
    """With an adapter that has learned something."""
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    )
    model = peft.get_peft_model(make_model(family), config, adapter_name=name)
    randomise(model)
    return model


@torch.no_grad()
def randomise(model: nn.Module, name: str = "default", seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if ".lora_" in key and name in key.split("."):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def roles_of(model: peft.PeftModel, critic: str = "lora", **arguments) -> Roles:
    adapters = Adapters(model)
    prepare_model(adapters.model)
    roles = Roles(adapters.model, critic=critic, with_reference=True, adapters=adapters, **arguments)
    if critic == "lora":
        randomise(adapters.model, "critic", seed=2)
        nn.init.normal_(roles.critic.head.weight, generator=torch.Generator().manual_seed(3))
    return roles


def sampled(roles: Roles, **arguments) -> Rollout:
    return Engine(roles.policy).generate(PROMPTS, SamplingParams(n=3, max_new_tokens=9, seed=5), **arguments)


def gradients(roles: Roles, rollout: Rollout) -> dict[str, Tensor]:
    """Of a loss of both roles, by the names of all that learns."""
    outputs = roles(rollout)
    (outputs.logprobs.sum() + outputs.values.square().sum()).backward()
    found = {f"{role}/{name}": p.grad for role, own in roles.trained().items() for name, p in own.named_parameters()}
    roles.zero_grad()
    return found


@pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen2", "qwen3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_was_sampled_has_the_bits_of_scoring_and_training(family, checkpointing):
    roles = roles_of(wrapped(family), gradient_checkpointing=checkpointing)
    assert trunk_of(roles.policy) is not None
    rollout = sampled(roles)
    assert torch.equal(roles(rollout).logprobs, rollout.logprobs)
    with torch.no_grad():
        assert torch.equal(roles(rollout.select([4, 1])).logprobs, rollout.select([4, 1]).logprobs)


def modules_only(monkeypatch) -> None:
    for name in ("fastppo.model.packed.trunk_of", "fastppo.roles.trunk_of"):
        monkeypatch.setattr(name, lambda model: None)


def test_gradients_are_as_exact_as_pefts_own(monkeypatch):
    """Those of both adapters, where the kernels add them to the weights and where peft's modules add their products."""
    roles = roles_of(wrapped("qwen2"))
    rollout = sampled(roles)
    ours = gradients(roles, rollout)
    modules_only(monkeypatch)
    native = gradients(roles, rollout)
    exact = gradients(roles.double(), rollout)
    assert len(ours) == 2 * 2 * 2 * 7 + 2 and all(x.any() for x in ours.values())
    for name, gradient in ours.items():
        assert_as_exact_as_model(gradient, native[name], exact[name], name)


def plain_copy(adapters: Adapters) -> PreTrainedModel:
    """The model without adapters, the policy's merged into its weights."""
    model = prepare_model(make_model("llama"))
    model.load_state_dict(adapters.merged_state())
    return model


def test_merged_weights_are_the_policy():
    """To the bit: what is written is what was sampled from."""
    roles = roles_of(wrapped())
    rollout = sampled(roles)
    alone = Roles(plain_copy(roles.adapters), critic="none")
    assert torch.equal(alone(rollout, values=False).logprobs, rollout.logprobs)
    layer = roles.policy.model.layers[0].mlp.up_proj
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    exact = layer.base_layer.weight.double() + 2 * b @ a
    assert_rounds_to(roles.adapters.merged_state()["model.layers.0.mlp.up_proj.weight"], exact)


def test_merged_copies_are_gone_when_the_rollout_ends(monkeypatch):
    """At once: no cycle of references holds them, or the cache, until Python looks for such."""
    roles, copies = roles_of(wrapped()), []

    def noted(weight, factors):
        copies.append(weakref.ref(found := merged(weight, factors)))
        return found

    monkeypatch.setattr("fastppo.model.parts.merged", noted)
    gc.disable()
    try:
        sampled(roles)
    finally:
        gc.enable()
    assert len(copies) >= 14 and not any(copy() is not None for copy in copies)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_role_is_its_own(family):
    """As three models are that share nothing; gpt2 runs peft's modules."""
    roles = roles_of(wrapped(family, fan_in_fan_out=family == "gpt2"))
    rollout = sampled(roles)
    before = roles(rollout)
    reference = roles.reference_logprobs(rollout)
    with torch.no_grad():
        assert torch.equal(reference, roles(rollout, values=False).logprobs), "it begins as the policy"
    randomise(roles.policy, "critic", seed=3)
    with torch.no_grad():
        after = roles(rollout)
        assert torch.equal(before.logprobs, after.logprobs) and not torch.equal(before.values, after.values)
        randomise(roles.policy, "default", seed=4)
        last = roles(rollout)
    assert torch.equal(after.values, last.values) and not torch.equal(after.logprobs, last.logprobs)
    assert torch.equal(reference, roles.reference_logprobs(rollout))


def test_a_new_adapter_changes_nothing_and_its_reference_is_the_trunk():
    model = prepare_model(make_model("llama"))
    plain = Roles(copy.deepcopy(model), critic="none")
    adapters = add_adapters(model, LoRAConfig(r=2), seed=0)
    state = torch.get_rng_state()
    roles = Roles(adapters.model, critic="lora", with_reference=True, adapters=adapters)
    assert torch.equal(torch.get_rng_state(), state) and not adapters.reference_parameters()
    rollout = sampled(roles)
    with torch.no_grad():
        expected = plain(rollout, values=False).logprobs
        randomise(roles.policy)
        assert torch.equal(roles.reference_logprobs(rollout), expected)
        assert not torch.equal(roles(rollout, values=False).logprobs, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_computed_again_is_computed_by_the_same_adapter(family):
    """The backward pass of both roles comes after the critic's forward pass."""
    model = wrapped(family, fan_in_fan_out=family == "gpt2")
    rollout = sampled(roles_of(copy.deepcopy(model)))
    kept, again = (gradients(roles_of(copy.deepcopy(model), gradient_checkpointing=x), rollout) for x in (False, True))
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_flags_of_gradients_stay_as_they_are():
    roles = roles_of(wrapped())
    learning = {name for name, p in roles.policy.named_parameters() if p.requires_grad}
    assert learning == {*roles.adapters.parameters("default"), *roles.adapters.parameters("critic")}
    with roles.adapters.speaking("critic"), roles.adapters.speaking("reference"):
        assert learning == {name for name, p in roles.policy.named_parameters() if p.requires_grad}


def test_two_active_adapters_are_refused_where_one_speaks():
    model = wrapped()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"adapters default, other are active, expected one"):
        Engine(model.get_base_model()).generate(PROMPTS, SamplingParams(max_new_tokens=2))


def test_an_adapter_that_peft_has_merged_is_part_of_the_weights():
    model = wrapped()
    before = sampled(roles_of(copy.deepcopy(model), critic="none"))
    prepare_model(model.get_base_model())
    model.merge_adapter()
    after = Engine(model.get_base_model()).generate(PROMPTS, SamplingParams(n=3, max_new_tokens=9, seed=5))
    assert parts_trunk.trunk_of(model.get_base_model()) is None and after.completions() == before.completions()


def two_adapters() -> nn.Module:
    model = wrapped()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    return model


def of_another_base() -> nn.Module:
    model = wrapped()
    model.peft_config["default"].base_model_name_or_path = "someone/another-model"
    model.get_base_model().name_or_path = "/models/this-model"
    return model


def prompt_tuning() -> nn.Module:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    return peft.get_peft_model(make_model("llama"), config)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "two adapters": (two_adapters, r"model has the adapters default, other, .* expected one"),
    "another base model": (of_another_base, r"made for 'someone/another-model', expected one for '/models/this-model'"),
    "prompt tuning": (prompt_tuning, r"model's adapter is of type PROMPT_TUNING, expected LORA"),
    "dora": (lambda: wrapped(use_dora=True), r"use_dora of the model's adapter is True, expected False"),
    "bias": (lambda: wrapped(bias="all"), r"bias of the model's adapter is 'all', expected 'none'"),
    "a head": (lambda: wrapped(modules_to_save=["lm_head"]), r"modules_to_save .*\['lm_head'\], expected None"),
    "a name of ours": (lambda: wrapped(name="critic"), r"adapter is called 'critic', expected another name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    make, message = REFUSED[case]
    with pytest.raises((TypeError, ValueError), match=message):
        adapters_of(make(), LoRAConfig())


def test_refused_settings():
    with pytest.raises(ValueError, match=r"lora.r is 2, expected 0 with a model that has an adapter already"):
        adapters_of(wrapped(), LoRAConfig(r=2))
    with pytest.raises(ValueError, match=r"lora.target_modules is \['nothing'\]: "):
        add_adapters(prepare_model(make_model("llama")), LoRAConfig(r=2, target_modules=("nothing",)), seed=0)
    with pytest.raises(ValueError, match=r"its output head lm_head is Linear, expected a plain"):
        add_adapters(prepare_model(make_model("llama")), LoRAConfig(r=2, target_modules=("q_proj", "lm_head")), seed=0)
    with pytest.raises(
        ValueError, match=r"critic.kind is lora, expected another kind where the policy has no adapters"
    ):
        Roles(prepare_model(make_model("llama")), critic="lora")
    with pytest.raises(ValueError, match=r"critic.kind is separate, expected lora, shared or none"):
        roles_of(wrapped(), critic="separate")


def test_the_folder_of_an_adapter_is_pefts(tmp_path):
    roles = roles_of(wrapped())
    roles.adapters.save(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    loaded = peft.PeftModel.from_pretrained(make_model("llama"), tmp_path / "adapter")
    expected = roles.adapters.trained("policy").state_dict()
    found = {
        name.replace(".default", ""): p for name, p in loaded.get_base_model().named_parameters() if ".lora_" in name
    }
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
