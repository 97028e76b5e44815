"""TRL 1.8 and ours on the same inputs, and a run of its PPO trainer; tests/integrations/test_trl_trainers.py starts it with TRL 1.8."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from fastppo.integrations import trl as ours
from tests.integrations.test_trl import (
    LOGITS,
    assert_parity,
    batches,
    exact_entropy,
    exact_head,
    exact_logprobs,
    fixed,
    heads,
)
from tests.integrations.test_trl_trainers import _one_draw_for_all_types, assert_same_runs, curves, run  # noqa: F401
from tests.tiny import LETTERS, make_model, make_tokenizer
from tests.tolerance import assert_as_exact_as_model, assert_rounds_to


@pytest.fixture(autouse=True)
def patched():
    """As a user has it: TRL's own functions are those that the patch replaced."""
    assert version("trl").startswith("1.8.")
    with ours.patch() as patch:
        yield dict(patch)


UTILS, PPO = "trl.trainer.utils", "trl.experimental.ppo.ppo_trainer"


def functions(name: str, module: str = UTILS) -> tuple[Callable, Callable]:
    """(ours, theirs)"""
    from fastppo.integrations.trl import _PEER

    target = f"{module}:{name}"
    (replacement,) = [one for one in _PEER._replacements["1.8"] if one.target == target]
    return replacement.ours, ours.patch()[target]


@fixed
@given(batches(), st.sampled_from([None, 2]), st.booleans())
def test_selective_log_softmax(batch, several: int | None, scalar: bool):
    mine, theirs = functions("selective_log_softmax")
    leaf, view, index, *_ = batch
    assume(several is None or leaf.shape[-1] > 1)  # else the exact gradient is 0, and TRL's too
    index = index if several is None else torch.randint(0, leaf.shape[-1], (*index.shape, several))
    exact = lambda x: exact_logprobs(view(x), index, 1.0)  # noqa: E731
    rule = assert_as_exact_as_model
    assert_parity(lambda x: mine(view(x), index), lambda x: theirs(view(x), index), exact, [leaf], scalar, rule)


@fixed
@given(batches(), st.booleans())
def test_entropy_from_logits(batch, scalar: bool):
    mine, theirs = functions("entropy_from_logits")
    leaf, view, *_ = batch
    exact = lambda x: exact_entropy(view(x))  # noqa: E731
    assert_parity(lambda x: mine(view(x)), lambda x: theirs(view(x)), exact, [leaf], scalar)


@fixed
@given(heads(), st.booleans())
def test_the_chunked_head(case, scalar: bool):
    """TRL's entropy has no gradient, ours with strict neither; its backward pass takes weights of the hidden states' type alone."""
    mine, theirs = functions("_ChunkedLogProbFunction.apply")
    (hidden, weight, *_), targets, options = case
    options |= {"outputs": ("entropy",)}
    arguments = list(options.values())[:4]

    def exact(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, entropy = exact_head((hidden, weight), targets, options)
        return logprobs, entropy.detach()

    def call(function: Callable, **more) -> Callable:
        def detached(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            logprobs, entropy = function(hidden, weight, targets, *arguments, **more)
            return logprobs, entropy.detach()

        return detached

    head = [hidden, weight.to(hidden.dtype)]
    assert_parity(call(mine, strict=True), call(theirs), exact, head, scalar, assert_as_exact_as_model)


def test_the_entropy_of_the_chunked_head_has_a_gradient():
    mine, _ = functions("_ChunkedLogProbFunction.apply")
    hidden, weight, targets = (
        torch.randn(3, 4, requires_grad=True),
        torch.randn(9, 4),
        torch.zeros(3, dtype=torch.int64),
    )
    _, entropy = mine(hidden, weight, targets, 1.0, 8)
    (gradient,) = torch.autograd.grad(entropy.sum(), hidden)
    exact = hidden.detach().double().requires_grad_()
    (true,) = torch.autograd.grad(exact_entropy(exact @ weight.double().T).sum(), exact)
    assert_rounds_to(gradient, true)
    assert not mine(hidden, weight, targets, 1.0, 8, strict=True)[1].requires_grad


def exact_whiten(values: Tensor, mask: Tensor, shift_mean: bool) -> Tensor:
    mean, variance = values[mask].mean(), values[mask].var()
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return whitened if shift_mean else whitened + mean


@fixed
@given(
    st.integers(2, 30),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(0, 99),
)
def test_masked_whiten(length: int, shift_mean: bool, dtype: torch.dtype, seed: int):
    """What lies outside the mask moves along in both."""
    mine, theirs = functions("masked_whiten", PPO)
    torch.manual_seed(seed)
    values, mask = (3 + torch.randn(3, length)).to(dtype), torch.rand(3, length) > 0.4
    mask[0, :2] = True
    calls = [lambda x, f=f: f(x, mask, shift_mean) for f in (mine, theirs, exact_whiten)]
    assert_parity(*calls, [values], rule=assert_as_exact_as_model)


def test_masked_whiten_of_one_element_and_of_nan_outside():
    """TRL's own are NaN; strict leaves them to it, as an empty mask is always."""
    values = torch.tensor([[1.0, 2.0, 4.0, torch.nan]])
    one, three = torch.tensor([[True, False, False, False]]), torch.tensor([[True, True, True, False]])
    _, theirs = functions("masked_whiten", PPO)
    assert ours.masked_whiten(values, one)[0, 0] == 0 and theirs(values, one).isnan().all()
    assert_rounds_to(ours.masked_whiten(values, three)[:, :3], exact_whiten(values.double(), three, True)[:, :3])
    assert theirs(values, three).isnan().all()
    for mask, options, message in [
        (one, {"strict": True}, "mask holds 1 elements, expected at least 2"),
        (three, {"strict": True}, "values is not finite everywhere"),
        (one & False, {}, "mask holds 0 elements, expected at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            ours.masked_whiten(values, mask, **options)
    with pytest.raises(TypeError, match="mask has dtype torch.int64"):
        ours.masked_whiten(values, one.long())


def test_modules_that_hold_the_functions_see_ours(patched: dict[str, Callable]):
    import trl.experimental.ppo.ppo_trainer as ppo
    import trl.trainer.grpo_trainer as grpo

    theirs = patched[f"{UTILS}:selective_log_softmax"], patched[f"{PPO}:masked_whiten"]
    assert ppo.selective_log_softmax is grpo.selective_log_softmax is not theirs[0]
    assert "fastppo" in type(grpo.entropy_from_logits(LOGITS.clone().requires_grad_()).grad_fn).__name__
    ours.unpatch()
    assert (ppo.selective_log_softmax, ppo.masked_whiten) == theirs == (grpo.selective_log_softmax, theirs[1])


@pytest.mark.parametrize("trainer, settings", [("GRPO", {"entropy_coef": 0.1}), ("RLOO", {"beta": 0.0})])
def test_curves_and_weights_of_a_run(trainer: str, settings: dict, tmp_path: Path):
    ours.unpatch()
    assert_same_runs(lambda dtype: run(trainer, tmp_path, dtype, **settings))


def test_curves_and_weights_of_ppo(tmp_path: Path):
    ours.unpatch()
    metrics = assert_same_runs(lambda dtype: run_ppo(tmp_path, dtype))
    assert metrics["loss/value_avg"].abs().max() > 0


def run_ppo(folder: Path, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    from datasets import Dataset
    from transformers import LlamaForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = make_tokenizer()
    prompts = [tokenizer(LETTERS[i : i + 3])["input_ids"] for i in range(8)]
    settings = {"per_device_train_batch_size": 8, "response_length": 5, "num_ppo_epochs": 2, "total_episodes": 16}
    settings |= {"learning_rate": 0.05, "optim": "sgd", "logging_steps": 1, "bf16": False, "seed": 1, "kl_coef": 0.1}
    settings |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "gradient_checkpointing": False}
    policy = make_model().to(dtype)
    scorers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        policy.config.num_labels = 1
        scorers.append(LlamaForSequenceClassification(policy.config).to(dtype))
    torch.manual_seed(0)
    trainer = PPOTrainer(
        args=PPOConfig(output_dir=str(folder), num_sample_generations=0, whiten_rewards=True, **settings),
        processing_class=tokenizer,
        model=policy,
        ref_model=make_model(seed=3).to(dtype),
        reward_model=scorers[0],
        value_model=scorers[1],
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        eval_dataset=Dataset.from_dict({"input_ids": prompts[:4]}),
    )
    trainer.train()
    return curves([row for row in trainer.state.log_history if "eps" not in row or row.pop("eps")]), {
        name: x.detach() for name, x in trainer.model.named_parameters()
    }
