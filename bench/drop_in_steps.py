"""Whole steps for `drop_in`, as a package comes and with ours patched in: of TRL's GRPO trainer, of stable-baselines3's PPO, and the loss of
a model of Transformers with its gradients."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from fastppo.bench.drop_in_functions import GAMMA, LAM
from fastppo.bench.harness import Case, Provider, Tensors, relative_error
from fastppo.bench.peers import OURS
from fastppo.integrations import stable_baselines3, transformers, trl
from fastppo.integrations.patching import logger
from fastppo.reference.gae import gae
from fastppo.reference.linear_token_logprobs import linear_token_logprobs

ROUNDS = 3  # a step takes seconds
Patching = Callable[[], contextlib.AbstractContextManager]


class Lazy:
    """A trainer that is made when it is first needed, so that listing the cases costs nothing; every call is a step."""

    def __init__(self, make: Callable[[], Provider], patching: Patching = contextlib.nullcontext) -> None:
        self.make, self.patching, self.step = make, patching, None

    def prepare(self, x: Tensors) -> Tensors:
        if self.step is None:
            self.step = self.make()
        return {}

    def __call__(self, x: Tensors) -> Tensors:
        self.prepare(x)
        with self.patching():
            return self.step(x)


class Refusals(logging.Handler):
    """Collects what the integrations log: the calls that went to the package's own function."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())


@contextlib.contextmanager
def wholly(patch: Patching) -> Iterator[None]:
    """`patch`; RuntimeError where a call of the step was passed on, so that theirs is not measured as ours."""
    refusals = Refusals()
    logger.addHandler(refusals)
    try:
        with patch():
            yield
    finally:
        logger.removeHandler(refusals)
    if refusals.told:
        raise RuntimeError(f"not all of the step is ours: {refusals.told[0]}")


def make_case(
    package: str, module: str, name: str, make: Callable[[], Provider], patch: Patching, compare: Callable
) -> Case:
    steps = {OURS: Lazy(make, lambda: wholly(patch)), package: Lazy(make)}
    return Case(
        op="drop_in",
        name=f"{package} {name}",
        inputs=lambda generator: {"seed": torch.randint(1 << 31, (), generator=generator)},
        providers=steps,
        prepare={provider: step.prepare for provider, step in steps.items()},
        exact=lambda x: {},
        compare=compare,
        baseline=package,
        imports=lambda: import_module(module),
        rounds=ROUNDS,
        peaks=True,
    )


def make_model(vocabulary: int, hidden: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=1,
    )
    return Qwen2ForCausalLM(config).to(dtype)


def exact_norm(self: Qwen2RMSNorm, x: Tensor) -> Tensor:
    """Transformers' own goes through fp32."""
    return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


class GRPOShape(NamedTuple):
    vocabulary: int
    hidden: int
    completions: int
    prompt: int
    new_tokens: int


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(vocabulary)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w1", padding_side="left")


class GRPOStep:
    """A step of TRL's `GRPOTrainer`: samples completions of a prompt, scores them, and updates a small Qwen2.

    Gives the completions [B, N], and what their update saw: the mean entropy, the norm of the gradient, and the last norm's gradient, which
    every token's loss reaches through the head.
    """

    def __init__(self, shape: GRPOShape, dtype: torch.dtype = torch.float32, completions: Tensor | None = None) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        self.shape, self.completions, self.gradient = shape, completions, None
        self.folder = tempfile.TemporaryDirectory()
        model = make_model(shape.vocabulary, shape.hidden, dtype)
        model.model.norm.weight.register_post_accumulate_grad_hook(self._keep_gradient)
        prompt = " ".join(f"w{2 + index}" for index in range(shape.prompt))
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")  # that rollout_func is experimental
            self.trainer = GRPOTrainer(
                model=model,
                reward_funcs=self._reward,
                args=GRPOConfig(**self._options()),
                train_dataset=Dataset.from_dict({"prompt": [prompt]}),
                processing_class=make_tokenizer(shape.vocabulary),
                rollout_func=None if completions is None else self._replay,
            )

    def _options(self) -> dict:
        shape = self.shape
        return {
            "output_dir": self.folder.name,
            "per_device_train_batch_size": shape.completions,
            "num_generations": shape.completions,
            "max_completion_length": shape.new_tokens,
            "generation_kwargs": {"min_new_tokens": shape.new_tokens},
            "max_steps": 1,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
        }

    def _keep_gradient(self, parameter: Tensor) -> None:
        self.gradient = parameter.grad.clone()

    def _reward(self, completion_ids: list[list[int]], **_) -> list[float]:
        """Share of the tokens in the lower half of the vocabulary."""
        self.completions = torch.tensor(completion_ids)
        half = self.shape.vocabulary // 2
        return [sum(token < half for token in ids) / len(ids) for ids in completion_ids]

    def _replay(self, prompts: list[str], trainer) -> dict:
        ids = trainer.processing_class(prompts)["input_ids"]
        return {"prompt_ids": ids, "completion_ids": self.completions.tolist(), "logprobs": None}

    def __call__(self, x: Tensors) -> Tensors:
        torch.manual_seed(int(x["seed"]))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            self.trainer.train()
        log = next(entry for entry in reversed(self.trainer.state.log_history) if "entropy" in entry)
        figures = {name: torch.tensor(log[name], dtype=self.gradient.dtype) for name in ("entropy", "grad_norm")}
        return {"completions": self.completions, "gradient": self.gradient} | figures


def exact_head(hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs) -> tuple:
    """What TRL's chunked head gives, in fp64."""
    options = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale, "return_entropy": True}
    return *linear_token_logprobs(hidden, weight, targets, **options), None, None, None


def compare_grpo(shape: GRPOShape) -> Callable[[Tensors, Tensors, Tensors], float]:
    """Of the step's update, against a step in fp64 on the same completions."""

    known: list[Tensors] = []  # the other provider drew the same tokens, if rounding moved none

    def compare(x: Tensors, outputs: Tensors, _: Tensors) -> float:
        drawn = outputs["completions"]
        exact = next((one for one in known if torch.equal(one["completions"], drawn)), None)
        if exact is None:
            step = GRPOStep(shape, torch.float64, drawn)
            with (
                mock.patch("trl.trainer.utils._ChunkedLogProbFunction", SimpleNamespace(apply=exact_head)),
                mock.patch.object(Qwen2RMSNorm, "forward", exact_norm),
            ):
                exact = step(x)
            known.append(exact)
        return max(relative_error(name, outputs[name], exact[name]) for name in ("entropy", "grad_norm", "gradient"))

    return compare


def grpo_case(quick: bool) -> Case:
    shape = GRPOShape(400, 32, 2, 4, 8) if quick else GRPOShape(32000, 128, 8, 64, 64)
    name = f"a GRPOTrainer step, {shape.completions} completions of {shape.new_tokens} tokens, V={shape.vocabulary}"
    return make_case("trl", "trl.trainer.grpo_trainer", name, lambda: GRPOStep(shape), trl.patch, compare_grpo(shape))


class PPOStep:
    """What stable-baselines3's PPO does from one update to the next on CartPole: `steps` steps collected, advantages, ten epochs.

    Gives the buffer [steps, 1] as the advantages were made from it.
    """

    def __init__(self, steps: int) -> None:
        from stable_baselines3 import PPO
        from stable_baselines3.common.callbacks import BaseCallback

        step = self

        class Keep(BaseCallback):
            def _on_step(self) -> bool:
                return True

            def _on_rollout_end(self) -> None:
                step.outputs = step._kept(self.locals)

        self.steps, self.callback, self.outputs = steps, Keep(), {}
        self.trainer = PPO("MlpPolicy", "CartPole-v1", n_steps=steps, gamma=GAMMA, gae_lambda=LAM, seed=0, device="cpu")

    @staticmethod
    def _kept(found: dict) -> Tensors:
        buffer = found["rollout_buffer"]
        names = ("rewards", "values", "episode_starts", "advantages", "returns")
        arrays = {name: torch.from_numpy(getattr(buffer, name).copy()) for name in names}
        return arrays | {"last_values": found["values"].flatten(), "dones": torch.from_numpy(found["dones"])}

    def __call__(self, x: Tensors) -> Tensors:
        self.trainer.set_random_seed(int(x["seed"]))
        self.trainer.learn(self.steps, callback=self.callback)
        return self.outputs


def compare_ppo(x: Tensors, outputs: Tensors, _: Tensors) -> float:
    """Of advantages and returns, against fp64 on the rollout that this very step collected."""
    rewards, values, last = (outputs[name].double() for name in ("rewards", "values", "last_values"))
    ends = torch.cat((outputs["episode_starts"][1:].bool(), outputs["dones"][None]))
    exact = gae(rewards.T, values.T, gamma=GAMMA, lam=LAM, dones=ends.T, next_values=last)
    pairs = zip(("advantages", "returns"), exact, strict=True)
    return max(relative_error(name, outputs[name], found.T) for name, found in pairs)


def ppo_case(quick: bool) -> Case:
    steps = 64 if quick else 2048
    name = f"a PPO step, CartPole, {steps} steps"
    return make_case(
        "stable-baselines3", "stable_baselines3.ppo", name, lambda: PPOStep(steps), stable_baselines3.patch, compare_ppo
    )


class LossStep:
    """The loss of a small Qwen2 on [B, T] tokens, and its gradients; gives the loss and the gradient of the norm that `normed` has."""

    def __init__(
        self,
        size: tuple[int, int],
        dtype: torch.dtype = torch.float32,
        patch: Callable[[PreTrainedModel], object] = lambda model: None,
        normed: str = "model.norm",
    ) -> None:
        self.model = make_model(*size, dtype)
        patch(self.model)
        self.weight = self.model.get_submodule(normed).weight

    def __call__(self, x: Tensors) -> Tensors:
        self.model.zero_grad()
        loss = self.model(input_ids=x["tokens"], labels=x["tokens"]).loss
        loss.backward()
        return {"loss": loss.detach(), "gradient": self.weight.grad.clone()}


def loss_case(quick: bool) -> Case:
    """The last norm's gradient comes through the head."""
    tokens, vocabulary, hidden = ((2, 8), 400, 32) if quick else ((4, 256), 32000, 256)
    name = f"Qwen2ForCausalLM's loss, {list(tokens)} tokens, H={hidden}, V={vocabulary}, forward + backward"
    return make_loss_case(name, tokens, (vocabulary, hidden), transformers.patch_model, "model.norm")


def layers_case(quick: bool) -> Case:
    """The first norm's gradient comes through all layers."""
    tokens, vocabulary, hidden = ((2, 8), 400, 32) if quick else ((8, 128), 400, 256)
    name = f"patch_layers: Qwen2ForCausalLM, {list(tokens)} tokens, H={hidden}, 2 layers, V={vocabulary}, forward + backward"
    return make_loss_case(
        name, tokens, (vocabulary, hidden), transformers.patch_layers, "model.layers.0.input_layernorm"
    )


def make_loss_case(
    name: str, tokens: tuple[int, int], size: tuple[int, int], patch: Callable[[PreTrainedModel], object], normed: str
) -> Case:
    def exact(x: Tensors) -> Tensors:
        with mock.patch.object(Qwen2RMSNorm, "forward", exact_norm):
            return LossStep(size, torch.float64, normed=normed)(x)

    steps = {
        OURS: Lazy(lambda: LossStep(size, patch=patch, normed=normed), lambda: wholly(contextlib.nullcontext)),
        "transformers": Lazy(lambda: LossStep(size, normed=normed)),
    }
    return Case(
        op="drop_in",
        name=f"transformers {name}",
        inputs=lambda generator: {"tokens": torch.randint(size[0], tokens, generator=generator)},
        providers=steps,
        prepare={provider: step.prepare for provider, step in steps.items()},
        exact=exact,
        baseline="transformers",
        largest=2 * math.prod(tokens) * size[0],
        peaks=True,
    )


CASES = (
    ("trl", grpo_case),
    ("stable-baselines3", ppo_case),
    ("transformers", loss_case),
    ("transformers", layers_case),
)
