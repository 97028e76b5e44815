"""A model that scores completions, or an ensemble of such models, as the reward."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fastppo.model import (
    context_length,
    encode_answered,
    evaluating,
    load_reward_model,
    load_tokenizer,
    resolve_device,
)
from fastppo.rewards.function import NoScore

NO_LIMIT = 10**9  # of tokens; what tokenizers have for "none" is larger

Text = str | list[dict[str, Any]]
Model = str | os.PathLike | PreTrainedModel


def most_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Longest text that a reward model reads. Some families, RoBERTa's above all, have fewer positions to give than their configuration says:
    their tokenizers know."""
    return min(context_length(model) or NO_LIMIT, tokenizer.model_max_length)


class RewardModel:
    """The score of a sequence-classification model with one label: `PPOTrainer(..., reward=RewardModel("runs/reward_model/model"))`.

    The model reads texts by its own tokenizer and chat template, so that its vocabulary need not be the policy's: where the tokenizer has a
    template, prompt and completion as a conversation, else as one text with an end of sequence. It runs in the trainer's process, in
    evaluation mode and without gradients, in batches of texts of about one length. A text that is longer than the model's positions, that
    the template refuses, or that has a token without an embedding gets no score, and the run says why: nothing is cut off.

    Several models are an ensemble against over-optimisation: its score is mean - `std_penalty` * standard deviation over the members (of all
    of them, not of a sample), the "mean minus std" of Eisenstein et al. 2023 (arXiv:2312.09244); compare Coste et al. 2023 (arXiv:2310.02743),
    who subtract a multiple of the variance. Each member reads by its own tokenizer.

    Args:
        model: a folder or hub name, or a loaded model, which stays where and as it is; or a list of these.
        tokenizer: of loaded models, one for all or a list with one each; named models have their own.
        device: of named models: "auto" is a GPU where there is one, "cpu", "cuda" or "cuda:N".
        dtype: of named models' weights: "auto" is float32 on the CPU, bfloat16 on a GPU. Scores are fp32.
        tokens_per_batch: most tokens, padding included, in one forward pass; a single longer text makes a batch of its own.
        std_penalty: k of mean - k * std, >= 0; 0 is the mean.

    Raises:
        ValueError, TypeError: an argument that is not as above, a folder without such a model, a model with another number of labels than
            one, a tokenizer with more tokens than the model has embeddings.
    """

    __name__ = "reward_model"  # of its metrics
    in_process = True  # a process forked from this one could not use its GPU, and would copy its weights

    def __init__(
        self,
        model: Model | Sequence[Model],
        tokenizer: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase] | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        tokens_per_batch: int = 16384,
        std_penalty: float = 0.0,
    ) -> None:
        models = list(model) if isinstance(model, list | tuple) else [model]
        tokenizers = list(tokenizer) if isinstance(tokenizer, list | tuple) else [tokenizer] * len(models)
        _check(models, tokenizers, tokens_per_batch, std_penalty)
        self._std_penalty = std_penalty
        self._members = [
            _Member(*_loaded(one, reader, device, dtype), tokens_per_batch)
            for one, reader in zip(models, tokenizers, strict=True)
        ]

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        """B scores, of texts or conversations; `NoScore` with the reason where there is none."""
        by_member = [member(prompts, completions) for member in self._members]
        return [self._combine(scores) for scores in zip(*by_member, strict=True)]

    def _combine(self, scores: tuple[float, ...]) -> float:
        without = [score for score in scores if isinstance(score, NoScore)]
        if without or len(scores) == 1:
            return (without or scores)[0]
        mean = sum(scores) / len(scores)
        variance = sum((score - mean) ** 2 for score in scores) / len(scores)
        return mean - self._std_penalty * math.sqrt(variance)


class _Member:
    """One model and the tokenizer that it reads by."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens_per_batch: int) -> None:
        self._model, self._tokenizer, self._tokens_per_batch = model, tokenizer, tokens_per_batch
        self._name = getattr(model, "name_or_path", None) or type(model).__name__
        self._known = model.get_input_embeddings().weight.shape[0]
        self._most_tokens = most_tokens(model, tokenizer)
        if model.config.num_labels != 1:
            raise ValueError(f"reward model {self._name!r} has num_labels = {model.config.num_labels}, expected 1")
        if tokenizer.vocab_size > self._known:
            raise ValueError(
                f"the tokenizer of reward model {self._name!r} has {tokenizer.vocab_size} tokens, expected at most {self._known}, the rows of "
                "the model's embedding: take the tokenizer that belongs to the model"
            )

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        read = [self._read(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        scores: dict[int, float] = {i: ids for i, ids in enumerate(read) if isinstance(ids, NoScore)}
        lengths = {i: len(ids) for i, ids in enumerate(read) if i not in scores}
        with torch.no_grad(), evaluating(self._model):
            # One text less than there are tokens, so that one is left to pad with.
            for batch in _batches(lengths, self._tokens_per_batch, self._known - 1):
                scores |= zip(batch, self._run([read[i] for i in batch]), strict=True)
        return [scores[i] for i in range(len(read))]

    def _read(self, prompt: Text, completion: Text) -> list[int] | NoScore:
        try:
            ids = encode_answered(self._tokenizer, prompt, completion)
        except ValueError as error:
            return NoScore(str(error))
        if len(ids) > self._most_tokens:
            return NoScore(f"longer than the {self._most_tokens} tokens that {self._name!r} reads")
        if max(ids, default=self._known) >= self._known:
            return NoScore(f"no text, or one with a token that {self._name!r} has no embedding for")
        return ids

    def _run(self, batch: list[list[int]]) -> list[float]:
        """fp32 scores of texts, padded on the right."""
        config = self._model.config.get_text_config()
        pad, longest = config.pad_token_id, max(map(len, batch))
        if pad is None or not 0 <= pad < self._known:
            # Decoders score the last token that is not the pad token: without one of its own a model is lent one that ends no text here.
            pad = min(set(range(self._known)) - {ids[-1] for ids in batch})
        ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in batch], device=self._model.device)
        lengths = torch.tensor([[len(ids)] for ids in batch], device=ids.device)
        mask = (torch.arange(longest, device=ids.device) < lengths).long()
        with _changed(config, pad_token_id=pad, use_cache=False):  # a cache of keys and values that nobody reads
            return self._model(ids, attention_mask=mask).logits[:, 0].float().tolist()


@contextmanager
def _changed(config: PretrainedConfig, **values: Any) -> Iterator[None]:
    before = {name: getattr(config, name, None) for name in values}
    for name, value in values.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def _batches(lengths: Mapping[int, int], tokens: int, most: int) -> Iterator[list[int]]:
    """The keys of `lengths`, longest first, in groups of at most `most` whose padded size is at most `tokens`, but for single ones."""
    batch: list[int] = []
    for index in sorted(lengths, key=lambda index: -lengths[index]):
        if batch and (len(batch) == most or lengths[batch[0]] * (len(batch) + 1) > tokens):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _loaded(
    model: Model, tokenizer: PreTrainedTokenizerBase | None, device: str, dtype: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"tokenizer is {type(tokenizer).__name__}, expected a loaded tokenizer; named models have their own"
        )
    if isinstance(model, str | os.PathLike):
        loaded = load_reward_model(model, dtype=dtype, device=resolve_device(device))
        return loaded, load_tokenizer(model, "reward model") if tokenizer is None else tokenizer
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model is {type(model).__name__}, expected a folder, a hub name or a loaded model")
    if tokenizer is None:
        raise ValueError("tokenizer is None, expected the tokenizer of the loaded model")
    if (device, dtype) != ("auto", "auto"):
        raise ValueError(
            f"device is {device!r} and dtype {dtype!r}, expected auto with a loaded model, which stays as it is"
        )
    return model, tokenizer


def _check(models: list[Any], tokenizers: list[Any], tokens_per_batch: Any, std_penalty: Any) -> None:
    if not models:
        raise ValueError("model is an empty list, expected at least one")
    if len(tokenizers) != len(models):
        raise ValueError(f"tokenizer is a list of {len(tokenizers)}, expected {len(models)}, one for each model")
    if isinstance(tokens_per_batch, bool) or not isinstance(tokens_per_batch, int) or tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch is {tokens_per_batch!r}, expected an integer >= 1")
    if isinstance(std_penalty, bool) or not isinstance(std_penalty, numbers.Real) or not 0 <= std_penalty < math.inf:
        raise ValueError(f"std_penalty is {std_penalty!r}, expected a finite number >= 0")
    if std_penalty and len(models) == 1:
        raise ValueError(f"std_penalty is {std_penalty!r}, but there is one model: expected 0, or a list of models")
