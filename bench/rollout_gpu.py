"""Cases of `Engine.generate` on a GPU: decode steps of models of real shapes with random weights, against `generate`; seconds a new token.

Prompts are left out of the time on both sides: they are products, where a step is a read of weights, keys and values.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fastppo.bench import clock, floors
from fastppo.bench.harness import Case, Tensors
from fastppo.bench.rollout_workload import LONG_ROUNDS, Workload, prompts_of
from fastppo.bench.setting import Setting
from fastppo.rollout import Engine, SamplingParams

DTYPE = torch.bfloat16
UNSTOPPED = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


class Shape(NamedTuple):
    name: str
    kind: type[PreTrainedModel]
    config: PretrainedConfig
    batch: int
    prompt: int
    new: int

    @property
    def context(self) -> int:
        """Mean tokens that a step sees."""
        return self.prompt + self.new // 2

    def make(self, device: torch.device | str) -> PreTrainedModel:
        torch.manual_seed(0)
        with torch.device(device):
            return self.kind(copy.deepcopy(self.config)).to(DTYPE).eval()  # the model's own: preparing it changes it


SMALL = Qwen3Config(
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
    **UNSTOPPED,
)
LARGE = Qwen2Config(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    **UNSTOPPED,
)
TINY = Qwen2Config(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    **UNSTOPPED,
)
SHAPES = (
    Shape("Qwen3-1.7B", Qwen3ForCausalLM, SMALL, 256, 736, 64),
    Shape("Qwen2.5-7B", Qwen2ForCausalLM, LARGE, 64, 480, 64),
)
QUICK = (Shape("Qwen2 tiny", Qwen2ForCausalLM, TINY, 4, 12, 8), Shape("Qwen2 tiny", Qwen2ForCausalLM, TINY, 2, 12, 8))


class DecodeWorkload(Workload):
    """`batch` prompts of one length, and as many new tokens for each: the first comes from the prompt, the others from decode steps."""

    # Of bf16 hidden states that came about in different batches, against fp64: the largest difference that an 8-layer model shows is 0.03.
    allowed_error = 0.15
    checked_sequences = 2

    def __init__(self, shape: Shape, device: str) -> None:
        super().__init__((), 1, shape.new, shape.new, ())
        self.shape, self.device = shape, torch.device(device)
        self.model: PreTrainedModel | None = None

    def ours(self, x: Tensors) -> Tensors:
        if self.engine is None:
            self.engine = Engine(self.shape.make(self.device), max_batch_size=self.shape.batch, keep_cache=True)
        sampling = SamplingParams(min_new_tokens=self.min_new, max_new_tokens=self.max_new)
        outputs = self.outputs(self.engine.generate(prompts_of(x), sampling))
        stats = self.engine.stats
        return outputs | self._told(stats.decode_tokens, stats.decode_seconds)

    @torch.no_grad()
    def transformers(self, x: Tensors) -> Tensors:
        if self.model is None:
            self.model = self.shape.make(self.device)
        mask, made = torch.ones_like(x["tokens"]), []

        def generate(new: int) -> None:
            config = GenerationConfig(do_sample=True, top_k=0, min_new_tokens=new, max_new_tokens=new, pad_token_id=0)
            made.append(self.model.generate(x["tokens"], attention_mask=mask, generation_config=config))

        of_prompts = clock.seconds(lambda: generate(1), self.device)
        seconds = clock.seconds(lambda: generate(self.max_new), self.device) - of_prompts
        new_tokens = made[-1][:, self.shape.prompt :].numel()
        return {"new_tokens": torch.tensor(new_tokens)} | self._told(new_tokens - self.shape.batch, seconds)

    def _told(self, decoded: int, seconds: float) -> Tensors:
        return {"decoded": torch.tensor(decoded), "seconds": torch.tensor(seconds, dtype=torch.float64)}


def make_case(shape: Shape, device: str) -> Case:
    def inputs(generator: torch.Generator) -> Tensors:
        size = (shape.batch, shape.prompt)
        tokens: Tensor = torch.randint(shape.config.vocab_size, size, generator=generator)
        return {"tokens": tokens, "lengths": torch.full(size[:1], shape.prompt)}

    workload = DecodeWorkload(shape, device)
    return Case(
        op="rollout",
        name=f"{shape.name} shape, {shape.batch} sequences, context {shape.context}, bf16, a decoded token",
        inputs=inputs,
        providers={"fastppo": workload.ours, "eager": workload.transformers},
        exact=lambda x: {},
        compare=workload.compare,
        work=floors.decode(shape.make("meta"), shape.batch, shape.context),
        per="decoded",
        seconds="seconds",
        rounds=LONG_ROUNDS,
        dtype="bf16",
    )


def cases(setting: Setting) -> list[Case]:
    return [make_case(shape, setting.device) for shape in (QUICK if setting.quick else SHAPES)]
