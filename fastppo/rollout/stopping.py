"""Where completions stop: ids that end one, strings found on the host in the text of its last tokens, and what to say of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastppo.model.decoding import decode, token_text
from fastppo.model.endings import ending_ids, find_turn_end
from fastppo.model.packed import lm_head
from fastppo.rollout.rollout import FinishReason, Rollout
from fastppo.rollout.sampling import SamplingParams

# A character takes at most four bytes, and a byte-level token holds at least one.
TOKENS_PER_CHARACTER = 4
# Tokens before those that can hold the string: a tokenizer treats the first token of a text specially, and it may begin inside a character.
MARGIN = 4


class StopStrings:
    """Does the newest token of a completion complete one of `strings`? Special tokens count as text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: tuple[str, ...]) -> None:
        self._tokenizer, self._strings = tokenizer, strings
        self._window = TOKENS_PER_CHARACTER * max(map(len, strings)) + MARGIN

    def completed_by_last(self, tokens: list[int]) -> bool:
        """tokens: a whole completion so far; only its tail is decoded. A string that was there before the last token does not count."""
        tail = tokens[-self._window :]
        now = self._decode(tail)
        found = [text for text in self._strings if text in now]
        if not found:
            return False
        before = self._decode(tail[:-1])
        return any(now.count(text) > before.count(text) for text in found)

    def _decode(self, tokens: list[int]) -> str:
        return decode(self._tokenizer, tokens, skip_special_tokens=False)


def stop_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, sampling: SamplingParams
) -> dict[int, list[str]]:
    """Token ids that end a completion, each with the names of the places that say so.

    Raises ValueError naming the stop id that is outside the model's vocabulary.
    """
    vocab_size = lm_head(model).weight.shape[0]
    found = {} if sampling.ignore_eos else ending_ids(model, tokenizer)
    for i, token in enumerate(sampling.stop_token_ids):
        if token >= vocab_size:
            raise ValueError(f"stop_token_ids[{i}] is {token}, expected less than the vocabulary size {vocab_size}")
        found.setdefault(token, []).append("stop_token_ids")
    return found


def describe_stops(stops: Mapping[int, list[str]], tokenizer: PreTrainedTokenizerBase, sampling: SamplingParams) -> str:
    """ "<|im_end|> (2), </s> (0) or the text '###'"; "no token" where nothing ends a completion."""
    tokens = [f"{token_text(tokenizer, token)} ({token})" for token in stops]
    texts = [f"the text {text!r}" for text in sampling.stop_strings]
    *most, last = [*tokens, *texts] or ["no token"]
    return f"{', '.join(most)} or {last}" if most else last


def cut_off_warning(
    rollout: Rollout, stops: Mapping[int, list[str]], tokenizer: PreTrainedTokenizerBase, sampling: SamplingParams
) -> str | None:
    """What to say of a rollout of which more than half was cut off, with the likely reason; None where it was less."""
    cut = [reason == FinishReason.LENGTH for reason in rollout.finish_reasons.tolist()]
    if sum(cut) * 2 <= len(cut):
        return None
    completions = [tokens for tokens, is_cut in zip(rollout.completions(), cut, strict=True) if is_cut]
    why = _why_cut_off(completions, stops, tokenizer, sampling)
    return f"{sum(cut)} of {len(cut)} completions were cut off at max_new_tokens = {sampling.max_new_tokens}: {why}"


def _why_cut_off(
    completions: list[list[int]],
    stops: Mapping[int, list[str]],
    tokenizer: PreTrainedTokenizerBase,
    sampling: SamplingParams,
) -> str:
    turn_end = find_turn_end(tokenizer)
    if turn_end is not None and turn_end.token is None and turn_end.text and not sampling.stop_strings:
        return (
            f"the chat template closes a turn with {turn_end.text!r}, which is no token of its own; "
            "rollout.stop_strings can name it"
        )
    if not stops and not sampling.stop_strings:
        return "nothing ends one; rollout.stop_token_ids or rollout.stop_strings can name what does"
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} - set(stops)
    firsts = Counter(next((token for token in tokens if token in special), None) for tokens in completions)
    token, count = firsts.most_common(1)[0]
    if token is not None:
        return (
            f"{token_text(tokenizer, token)} ({token}) stands in {count} of them and ends none; "
            "rollout.stop_token_ids can name it"
        )
    return "their answers are longer, or the model has not learned to end them"
