"""What the cases of rollouts share: a small Qwen2, and how it and Transformers' `generate` are asked for the same."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from fastppo.bench.harness import Tensors, WrongResult
from fastppo.model import packed_hidden
from fastppo.rollout import Engine, Rollout, SamplingParams

VOCABULARY = 4096
SLOTS = 32
ROUNDS, LONG_ROUNDS = 5, 2  # of a call of half a second, and of one that takes Transformers ten
# Stops a completion with probability 1/32 at each token, since the model is nearly uniform: a long tail of lengths.
STOP_IDS = tuple(range(VOCABULARY // 32))
ROLLOUT_NAMES = ("tokens", "cu_seqlens", "position_ids", "action_mask", "logprobs", "prompt_index", "finish_reasons")


@cache
def make_model(hidden: int, layers: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    return Qwen2ForCausalLM(config).eval()


def prompts_of(x: Tensors) -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(x["tokens"], x["lengths"].tolist(), strict=True)]


class Workload:
    """What both sides are asked for, and how each is asked."""

    allowed_error = 1e-4  # of raw log-probabilities against a packed forward: what the trainer allows
    checked_sequences = 8

    def __init__(self, size: tuple[int, int], n: int, min_new: int, max_new: int, stops: tuple[int, ...]) -> None:
        # Two models of equal weights: fastppo's attention would slow `generate` down, which must run as it comes.
        self.size, self.n, self.min_new, self.max_new, self.stops = size, n, min_new, max_new, stops
        self.engine: Engine | None = None

    def ours(self, x: Tensors) -> Tensors:
        if self.engine is None:
            self.engine = Engine(make_model.__wrapped__(*self.size), max_batch_size=SLOTS)
        sampling = SamplingParams(
            n=self.n, min_new_tokens=self.min_new, max_new_tokens=self.max_new, stop_token_ids=self.stops
        )
        return self.outputs(self.engine.generate(prompts_of(x), sampling))

    def outputs(self, rollout: Rollout) -> Tensors:
        return {name: getattr(rollout, name) for name in ROLLOUT_NAMES} | {"new_tokens": rollout.action_mask.sum()}

    @torch.no_grad()
    def transformers(self, x: Tensors) -> Tensors:
        """In batches of at most as many sequences as our engine has slots, left-padded, with its own default sampling loop."""
        model, total = make_model(*self.size), 0
        for batch in self._batches(prompts_of(x)):
            longest = max(map(len, batch))
            tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
            out = model.generate(tokens, attention_mask=mask, generation_config=self._generation_config())
            total += self._count(out[:, longest:])
        return {"new_tokens": torch.tensor(total)}

    def _batches(self, prompts: list[list[int]]) -> Iterator[list[list[int]]]:
        size = max(1, SLOTS // self.n)
        return (prompts[i : i + size] for i in range(0, len(prompts), size))

    def _generation_config(self) -> GenerationConfig:
        return GenerationConfig(
            do_sample=True,
            top_k=0,
            num_return_sequences=self.n,
            min_new_tokens=self.min_new,
            max_new_tokens=self.max_new,
            eos_token_id=list(self.stops) or None,
            pad_token_id=0,
        )

    def _count(self, new: Tensor) -> int:
        """Tokens up to and with each row's first stop; what follows it is padding."""
        if not self.stops:
            return new.numel()
        stopped = torch.isin(new, torch.tensor(self.stops))
        stopped[:, : self.min_new - 1] = False  # id 0 among them is drawn only as a stop
        before = stopped.long().cumsum(1) - stopped.long()
        return int((before == 0).sum())

    def compare(self, x: Tensors, outputs: Tensors, exact: Tensors) -> float:
        """Our log-probabilities against a packed forward in fp64; of both, that as many tokens came as were asked for."""
        sequences, new_tokens = len(x["tokens"]) * self.n, int(outputs["new_tokens"])
        if not sequences * self.min_new <= new_tokens <= sequences * self.max_new:
            raise WrongResult(
                f"{new_tokens} new tokens, expected {self.min_new} to {self.max_new} for each of {sequences}"
            )
        if "logprobs" not in outputs:
            return 0.0
        rollout = Rollout(
            **{name: outputs[name] for name in ROLLOUT_NAMES},
            processed_logprobs=outputs["logprobs"],
            temperature=1.0,
        )
        error = self._logprob_error(rollout.select(range(min(self.checked_sequences, sequences))))
        if not error <= self.allowed_error:
            raise WrongResult(f"logprobs are off by {error:.2g}, allowed {self.allowed_error:g}", error)
        return error

    @torch.no_grad()
    def _logprob_error(self, rollout: Rollout) -> float:
        model = self.engine.model
        hidden = packed_hidden(model, rollout.tokens, rollout.position_ids, rollout.cu_seqlens).double()
        logits = hidden.roll(1, 0) @ model.get_output_embeddings().weight.double().t()
        expected = logits.log_softmax(-1).gather(1, rollout.tokens[:, None]).squeeze(1)
        return (rollout.logprobs - expected[rollout.actions]).abs().max().item()
