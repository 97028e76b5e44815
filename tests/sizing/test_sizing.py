"""Shapes without weights, memory by parts, floors of time, what fits and what would."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fastppo.bench import floors
from fastppo.sizing import cheapest_change, device_named, fitting_settings, memory_of, shape_of, step_time
from fastppo.sizing.devices import GPUS, USABLE
from fastppo.sizing.memory import fits
from fastppo.sizing.step_time import communicated
from tests.sizing.toys import llama_8b, outline, setup_on
from tests.tiny import make_model

TINY = LlamaConfig(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)


# Shapes


def test_a_llama_of_8_billion():
    shape = llama_8b()
    assert shape.parameters == 8_030_261_248  # its model card
    assert (shape.layers, shape.hidden, shape.tied) == (32, 4096, False)
    assert shape.cached == 2 * 32 * 8 * 128
    assert shape.query == 32 * 4096
    assert shape.widths == (4096, 1024, 32, 14336)
    assert shape.trunk == shape.parameters - 2 * 128256 * 4096 == shape.used_trunk


def test_what_modules_keep_of_a_token_is_what_they_save():
    """Of an fp32 Llama whose layers Transformers runs: the same as the tensors that autograd saves of a real pass, but attention's."""
    model = make_model(num_hidden_layers=2).train()
    saved: dict[int, torch.Tensor] = {}
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}

    def note(x):
        if x.untyped_storage().data_ptr() not in own:
            saved[x.untyped_storage().data_ptr()] = x
        return x

    found = []
    for count in (16, 48):
        saved.clear()
        model.set_attn_implementation("sdpa")
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            out = model.base_model(torch.zeros(1, count, dtype=torch.int64), use_cache=False).last_hidden_state
        found.append(sum(x.untyped_storage().nbytes() for x in saved.values()))
        del out
    measured = (found[1] - found[0]) / 32
    shape = shape_of(outline(LlamaForCausalLM, model.config), torch.float32, None)
    assert abs(shape.kept - measured) < 0.1 * measured, (shape.kept, measured)


def test_models_of_other_kinds():
    gpt = shape_of(
        outline(GPT2LMHeadModel, GPT2Config(n_layer=3, n_embd=48, n_head=4, vocab_size=90)), torch.float32, 1024
    )
    assert gpt.tied and gpt.widths is None and gpt.kept > 3 * 48 * 4 and gpt.cached == 2 * 3 * 48
    config = Qwen3MoeConfig(
        vocab_size=90, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=8, num_experts_per_tok=2, decoder_sparse_step=1,
    )  # fmt: skip
    mixture = shape_of(outline(Qwen3MoeForCausalLM, config), torch.bfloat16, None)
    experts = 2 * 8 * 3 * 32 * 16
    assert mixture.experts == experts and mixture.used_trunk == mixture.trunk - experts * 3 / 4


# Memory


def test_parts_of_a_full_run_in_bfloat16():
    """Two bytes a weight, and what learns 16 more: gradient, master and two moments in fp32."""
    setup = setup_on("h200", llama_8b(), reward={"kl_coef": 0.1})
    policy = setup.networks.policy
    critic, found = policy.parameters - policy.head, memory_of(setup)
    assert found.parts["policy's weights"] == found.parts["reference's weights"] == 2 * policy.parameters
    assert found.parts["critic's weights"] == 2 * critic
    assert found.parts["fp32 master weights"] * 2 == found.parts["AdamW's moments"] == 8 * (policy.parameters + critic)
    gradients = max(parts.get("gradients", 0) for parts in found.moments.values())
    assert gradients == 4 * (policy.parameters + critic)
    assert found.peak == sum(found.parts.values()) == max(sum(parts.values()) for parts in found.moments.values())


@pytest.mark.parametrize(("lora", "copied"), [(0, "policy's weights"), (8, None)])
def test_sampling_beside_the_update_needs_a_copy_and_its_cache_then(lora, copied):
    settings = {"lora": {"r": lora}, "critic": {"kind": "lora" if lora else "shared"}}
    fresh, stale = (setup_on("h200", llama_8b(), rollout={"staleness": staleness}, **settings) for staleness in (0, 1))
    before, after = memory_of(fresh).moments, memory_of(stale).moments
    copy = after["scoring"]["copy of what learns to sample from"]
    assert copy == (after["scoring"][copied] if copied else 4 * stale.policy_learns)
    update = next(name for name in after if name.startswith("update"))
    beside = {"keys and values", "logits of the tokens drawn", "layers' results"}
    assert beside <= after[update].keys() and not {"logits of the tokens drawn"} & before[update].keys()
    assert after[update]["keys and values"] == after["sampling"]["keys and values"]


def test_shards_divide_what_is_spread_and_nothing_else():
    whole, spread = (setup_on("h200", llama_8b(), ranks=8, sharding=kind) for kind in ("none", "full"))
    one, other = memory_of(whole).parts, memory_of(spread).parts
    for name in ("policy's weights", "critic's weights", "fp32 master weights", "AdamW's moments"):
        assert other[name] == one[name] / 8
    assert other["whole policy to sample from"] == one["policy's weights"]
    assert "layers gathered" in other and "layers gathered" not in one
    assert fits(spread) and not fits(whole)


def test_ranks_that_sample_together_divide_weights_and_heads():
    """Of what a team of four has as each rank alone: the plan divides all but embedding and norms, and the cache is for four ranks' sequences."""
    settings = {"distributed": {"sharding": "full"}, "rollout": {"prompts_per_step": 8, "batch_size": 64}}
    alone = setup_on("h200", llama_8b(), ranks=8, sharding="full", **settings)
    team = alone.changed(distributed__tensor_parallel=4)
    policy = team.networks.policy
    norms = 4096 * (2 * 32 + 1)
    assert policy.divided == policy.parameters - policy.head - norms and policy.teams == (2, 4, 8)
    one, other = (memory_of(each).moments["sampling"] for each in (alone, team))
    assert other["part of the policy to sample from"] == 2 * (policy.head + norms + policy.divided / 4)
    assert (alone.side_by_side, team.side_by_side) == (1, 4)
    assert other["keys and values"] == pytest.approx(one["keys and values"], rel=0.1)
    assert step_time(team).sampling < step_time(alone).sampling
    sent = communicated(team) - communicated(alone)
    tokens, drawn = 4 * (team.prompt + team.new), 4 * team.new
    assert sent == pytest.approx(3 / 4 * (tokens * 4 * 32 * 4096 * 2 + drawn * 4 * policy.vocabulary))


def test_a_team_is_advised_to_decode_all_that_it_samples():
    """The sequences of four ranks side by side, not of one."""
    settings = {"distributed": {"sharding": "full"}, "rollout": {"prompts_per_step": 32, "batch_size": 4}}
    team = setup_on("h200", llama_8b(), ranks=8, sharding="full", **settings).changed(distributed__tensor_parallel=4)
    best = next(each for each in fitting_settings(team) if each.team == 4)
    assert (best.sequences, best.decoded, best.side_by_side) == (4, 16, 16)


def test_what_does_not_fit_whole_is_sampled_together():
    """The copy of 16 GB leaves no room on two devices of 24; other devices would not help."""
    setup = setup_on("l4", llama_8b(), ranks=64, critic={"kind": "shared"}, rollout={"max_new_tokens": 64})
    small = replace(setup, device=setup.device._replace(memory=18e9))
    change = cheapest_change(small)
    assert change.learns_alike and fits(change.setup)
    assert any(word.startswith("distributed.tensor_parallel=") for word in change.words)
    assert not any(fits(each) for each in (small.changed("full"), small.changed("full", ranks=1024)))


@pytest.mark.parametrize(
    ("change", "falls"),
    [
        ({"learner__gradient_checkpointing": True}, "activations"),
        ({"learner__tokens_per_microbatch": 1024}, "activations"),
        ({"critic__kind": "shared"}, "AdamW's moments"),
        ({"lora__r": 8, "critic__kind": "lora"}, "AdamW's moments"),
        ({"rollout__batch_size": 4}, "keys and values"),
    ],
)
def test_what_saves_memory_saves_its_part(change, falls):
    setup = setup_on("h200", llama_8b())
    before, after = (
        {name: max(parts.get(name, 0) for parts in memory_of(each).moments.values()) for name in (falls,)}
        for each in (setup, setup.changed(**change))
    )
    assert 0 < after[falls] < 0.6 * before[falls]


def test_low_bits():
    """Moments in 8 bits, bf16 weights without masters, and 4 bits beside adapters."""
    policy = llama_8b()

    def parts(**sections):
        return memory_of(setup_on("h200", llama_8b(), critic={"kind": "shared"}, **sections)).parts

    plain, eight, random, both = (
        parts(optimizer=settings)
        for settings in (
            {},
            {"name": "adamw_8bit"},
            {"bf16_stochastic_round": True},
            {"name": "adamw_8bit", "bf16_stochastic_round": True},
        )
    )
    moments = [found["AdamW's moments"] / policy.parameters for found in (plain, eight, random, both)]
    assert moments == [8, 2 * (1 + 4 / 256), 4, 2 * (1 + 4 / 256)]
    assert "fp32 master weights" in plain and "fp32 master weights" in eight
    assert "fp32 master weights" not in random and "fp32 master weights" not in both
    four = parts(lora={"r": 16, "quantization": "nf4"})["policy's weights"]
    linear = sum(inputs * outputs * number for _, inputs, outputs, number in policy.linears)
    assert 0.5 * linear < four - 2 * (policy.parameters - linear) < 0.53 * linear


# Time


def test_the_flops_are_those_of_the_bench():
    """Of a step without attention's products, by `fastppo.bench.floors`: prompts of one sample, PPO with a reference and a critic, one epoch."""
    model = make_model()
    setup = setup_on(
        "h200", shape_of(outline(LlamaForCausalLM, model.config), torch.bfloat16, None), prompt=20,
        reward={"kl_coef": 0.1}, learner={"epochs": 1},
        rollout={"prompts_per_step": 4, "max_new_tokens": 12},
    )  # fmt: skip
    policy = replace(setup, networks=setup.networks._replace(policy=setup.networks.policy._replace(query=0)))
    expected = floors.ppo_step_flops(model, 4, 1, 20, 12)
    found, rate = step_time(policy), setup.device.half_flops
    assert found.scoring * rate == pytest.approx(expected["scoring"])
    head = 2 * policy.networks.policy.head * 4 * 12
    assert found.update * rate == pytest.approx(expected["update"] + head), "the head makes its logits again"


def test_decoding_waits_for_the_weights_and_for_the_products_of_many():
    few, many = (setup_on("h200", llama_8b(), rollout={"prompts_per_step": n, "batch_size": n}) for n in (1, 8192))
    policy, new = few.networks.policy, few.new
    assert step_time(few).sampling > new * 2 * (policy.trunk + policy.head) / 4.8e12
    assert step_time(few).sampling < 1.1 * new * 2 * (policy.trunk + policy.head) / 4.8e12
    assert step_time(many).sampling > new * 8192 * 2 * (policy.trunk + policy.head) / 989e12


def test_bytes_sent_by_replicated_and_by_sharded_weights():
    none, full = (
        setup_on("h200", llama_8b(), ranks=4, sharding=kind, critic={"kind": "shared"}) for kind in ("none", "full")
    )
    parameters, updates = none.networks.policy.parameters, none.updates
    assert communicated(none) == pytest.approx(3 / 4 * 2 * 4 * parameters * updates)
    rounds = full.microbatches
    passes = 1 + rounds * full.config.learner.num_minibatches + 2 * rounds * updates
    assert communicated(full) == pytest.approx(3 / 4 * parameters * (2 * passes + 4 * rounds * updates))
    assert communicated(setup_on("h200", llama_8b())) == 0


def test_more_nodes_are_as_fast_as_their_network():
    one, two = (setup_on("h200", llama_8b(), ranks=ranks, sharding="full") for ranks in (8, 16))
    assert step_time(one).communication == communicated(one) / 450e9
    assert step_time(two).communication == communicated(two) / 50e9


# What fits


def test_settings_that_fit_do_and_larger_ones_do_not():
    setup = setup_on("h200", llama_8b(), ranks=4)
    found = fitting_settings(setup)
    assert found and all(fits(each) for each in found)
    assert [step_time(each).total for each in found] == sorted(step_time(each).total for each in found)
    for each in found:
        if each.microbatch < each.minibatch:
            assert not fits(each.changed(learner__tokens_per_microbatch=2 * each.microbatch, rollout__batch_size=1))


@pytest.mark.parametrize(
    ("gpu", "ranks", "settings", "expected"),
    [
        ("h200", 8, {}, ["distributed.sharding=full"]),
        ("h200", 1, {}, ["lora.r=16", "critic.kind=lora"]),
        ("rtx5090", 1, {}, ["--gpus", "distributed.sharding=full"]),
        (
            "h200",
            1,
            {"lora": {"r": 8}, "learner": {"tokens_per_microbatch": 1 << 20, "num_minibatches": 1}},
            ["learner."],
        ),
    ],
)
def test_the_cheapest_change(gpu, ranks, settings, expected):
    setup = setup_on(gpu, llama_8b(), ranks=ranks, rollout={"prompts_per_step": 256}, **settings)
    assert not fits(setup)
    change = cheapest_change(setup)
    assert change is not None and fits(change.setup)
    for word in expected:
        assert any(found.startswith(word) for found in change.words), change.words
    if word == "learner.":
        assert change.learns_alike and not any(found.startswith(("--", "lora", "critic")) for found in change.words)


def test_nothing_helps_a_model_that_is_too_large_for_1024():
    """A rank samples from a whole policy, however many there are."""
    config = LlamaConfig(num_hidden_layers=8, hidden_size=16384, intermediate_size=53248)
    huge = setup_on("rtx4090", shape_of(outline(LlamaForCausalLM, config), torch.bfloat16, None))
    assert cheapest_change(huge) is None


# Devices


def test_devices_have_names():
    assert device_named("RTX 4090") == GPUS["rtx4090"] and device_named("A100_40GB") == GPUS["a100-40gb"]
    with pytest.raises(ValueError, match="--gpu is 'h300', expected one of a100-40gb, a100, h100, .*or cpu"):
        device_named("h300")


def test_the_cpu_is_this_one():
    cpu = device_named("cpu")
    assert 0 < cpu.memory and 1e8 < cpu.bandwidth and 1e8 < cpu.half_flops
    setup = setup_on(
        cpu, shape_of(outline(LlamaForCausalLM, TINY), torch.float32, None), torch.float32, prompt=8, ranks=2
    )
    assert setup.memory == cpu.memory / 2 and USABLE < 1
