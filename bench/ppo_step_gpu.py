"""Cases of a whole PPO step on a GPU: ours, with half-precision weights of a real shape; seconds a step, and of its phases.

The large one is the step of verl's quickstart (one GPU, 256 prompts of 105 tokens, 239 new ones, four minibatches), whose published split is
generation 21.5, reference 4.4, values 5.8, critic 15.7 and actor 20.3 s. Plain PyTorch does not take part: its padded step would use up the time.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from fastppo.bench import floors
from fastppo.bench.harness import Case, Tensors, WrongResult
from fastppo.bench.peers import OURS
from fastppo.bench.ppo_step import (
    CONFIG,
    FusedStep,
    Lazy,
    Shape,
    floor_sizes,
    log_softmax_gather,
    make_prompts,
    make_roles,
)
from fastppo.bench.rollout_gpu import TINY, UNSTOPPED
from fastppo.bench.setting import DTYPES, Setting, suffix

GPU_CONFIG = replace(
    CONFIG,
    optimizer=replace(CONFIG.optimizer, lr=1e-6),
    critic=replace(CONFIG.critic, lr=1e-5),
    learner=replace(CONFIG.learner, tokens_per_microbatch=16384),
)
# Largest difference of a log-prob or a value from fp64's that the roundings of 24 layers explain.
ALLOWED_ERROR = {"bf16": 0.15, "fp16": 0.03}
CHECKED_SEQUENCES = 2
ROUNDS = 1  # of a call of seconds, beside the one that is checked, one that rehearses and one for the peak of memory
QWEN = Qwen2Config(
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    **UNSTOPPED,
)
SMALL, QUICKSTART = Shape(896, 24, 64, 64, 64, 64), Shape(896, 24, 256, 105, 105, 239)
QUICK = Shape(64, 2, 8, 6, 6, 8)  # of the rollouts' tiny model


def make_model(config: Qwen2Config, dtype: str, device: str) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen2ForCausalLM(copy.deepcopy(config)).to(DTYPES[dtype])


def make_step(config: Qwen2Config, dtype: str, device: str, shape: Shape) -> FusedStep:
    return FusedStep(shape, make_model(config, dtype, device), GPU_CONFIG)


@torch.no_grad()
def first_step(config: Qwen2Config, dtype: str, x: Tensors, completions: torch.Tensor) -> Tensors:
    """Log-probs and values [sequences, N] in fp64, by the model's own forward from the weights before any update."""
    new, device = completions.shape[1], str(completions.device)
    roles = make_roles(make_model(config, dtype, device), critic="separate", with_reference=False).double().eval()
    tokens = torch.cat((x["tokens"][: len(completions)], completions), 1)
    for model in (roles.policy, roles.critic.trunk):
        model.set_attn_implementation("sdpa")
    logits = roles.policy(tokens, use_cache=False, logits_to_keep=new + 1).logits[:, :-1]
    states = roles.critic.trunk(tokens, use_cache=False).last_hidden_state[:, -new - 1 : -1]
    return {"old_logprobs": log_softmax_gather(logits, completions), "values": roles.critic.head(states)}


def checked(config: Qwen2Config, dtype: str, x: Tensors, outputs: Tensors, exact: Tensors) -> float:
    """The first step's log-probs and values of some sequences; of the rest that it is finite."""
    expected = first_step(config, dtype, x, outputs["completions"][:CHECKED_SEQUENCES])
    errors = [(outputs[name][:CHECKED_SEQUENCES].double() - own).abs().max().item() for name, own in expected.items()]
    if not max(errors) <= ALLOWED_ERROR[dtype]:
        raise WrongResult(f"{' and '.join(expected)} are off by {errors}, allowed {ALLOWED_ERROR[dtype]}", max(errors))
    for name in ("advantages", "returns", "losses"):
        if not outputs[name].isfinite().all():
            raise WrongResult(f"{name} are not finite")
    return max(errors)


def make_case(shape: Shape, config: Qwen2Config, dtype: str, device: str) -> Case:
    outline, sizes = make_model(config, dtype, "meta"), floor_sizes(shape)
    return Case(
        op="ppo_step",
        name=f"{'Qwen2 tiny' if config is TINY else 'Qwen2.5-0.5B shape'}, {shape.name}{suffix(dtype)}",
        inputs=partial(make_prompts, shape, vocabulary=config.vocab_size),
        providers={OURS: Lazy(partial(make_step, config, dtype, device), shape)},
        exact=lambda x: {},
        compare=partial(checked, config, dtype),
        work=floors.ppo_step(outline, *sizes, GPU_CONFIG.learner.num_minibatches),
        phase_flops=floors.ppo_step_flops(outline, *sizes),
        rounds=ROUNDS,
        dtype=dtype,
    )


def cases(setting: Setting) -> list[Case]:
    if setting.quick:
        return [make_case(QUICK, TINY, dtype, setting.device) for dtype in ("bf16", "fp16")]
    small = [make_case(SMALL, QWEN, dtype, setting.device) for dtype in ("bf16", "fp16")]
    return [*small, make_case(QUICKSTART, QWEN, "bf16", setting.device)]
