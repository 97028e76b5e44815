"""Which tokens end a completion: decided here, from all that a model comes with.

Four places name them, and they often differ: an instruct model's generation config may know only its family's end of text, while its turns
end with a chat token. All of them count. In a base model that has its family's chat template the turn's end is harmless: it is never drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastppo.model.packed import lm_head

ANSWER = "The assistant's answer."


class TurnEnd(NamedTuple):
    """How a chat template closes the assistant's turn."""

    token: int | None
    """The first token of its own after the answer."""
    text: str
    """All that follows the answer, without white space around it."""


def ending_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> dict[int, list[str]]:
    """Token ids that end a completion, each with the names of the places that say so.

    Ids outside the model's vocabulary, which many small configurations hold, can never be drawn and are left out.
    """
    found: dict[int, list[str]] = {}
    vocab_size = lm_head(model).weight.shape[0]
    for place, ids in _places(model, tokenizer):
        for token in ids:
            if 0 <= token < vocab_size:
                found.setdefault(token, []).append(place)
    return found


def _places(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[tuple[str, list[int]]]:
    generation_config = getattr(model, "generation_config", None)
    if getattr(generation_config, "eos_token_id", None) is not None:
        yield "generation config", _ids(generation_config)
    else:  # not otherwise: where a config.json names none it has its class's default, which may be an ordinary token
        yield "model config", _ids(model.config.get_text_config()) or _ids(model.config)
    if tokenizer is not None:
        yield "tokenizer", _ids(tokenizer)
        turn_end = find_turn_end(tokenizer)
        yield "chat template", [] if turn_end is None or turn_end.token is None else [turn_end.token]


def _ids(owner: object) -> list[int]:
    eos = getattr(owner, "eos_token_id", None)
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def find_turn_end(tokenizer: PreTrainedTokenizerBase) -> TurnEnd | None:
    """What the chat template writes after the assistant's last answer; None without a template, or with one that renders no plain turns.

    Only the last turn tells: what closes an earlier one may stand inside an answer (gpt-oss ends each of its messages alike).
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": "The user's question."}, {"role": "assistant", "content": ANSWER}]
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template is a program that raises what it likes
        return None
    _, answer, rest = rendered.rpartition(ANSWER)
    return TurnEnd(_first_token(tokenizer, rest), rest.strip()) if answer else None


def _first_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """The first place in a text that is a token whatever stands around it: a special one, or another that was added to the vocabulary."""
    tokens = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if str(token).strip()}
    found = [(text.index(token), -len(token), i) for token, i in tokens.items() if token in text]
    return min(found)[2] if found else None
