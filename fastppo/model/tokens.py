"""The one way from texts to token ids: of a prompt for a model to go on with, of an answered prompt for a reward model to judge."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, *, rendered: bool = False) -> list[int]:
    """Token ids of a text that a model is to go on with: with the special tokens that the tokenizer puts before texts, and without
    the end of sequence that some put after them, which would tell the model that all is said. One that the text itself ends with stays.

    Args:
        rendered: the text has its special tokens already, as a chat template writes them: none is added.
    """
    ids = _encode(tokenizer, text, special=not rendered)
    end = tokenizer.eos_token_id
    if rendered or end is None or len(ids) < 2 or ids[-1] != end:
        return ids
    own = _ends(_encode(tokenizer, text, special=False), end)
    return ids[: len(ids) - min(_ends(ids, end) - own, len(ids) - 1)]


def encode_answered(
    tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, Any]], completion: str | list[dict[str, Any]]
) -> list[int]:
    """Token ids of a prompt and its completion as a reward model reads them, in training and in scoring alike.

    Where the tokenizer has a chat template, a conversation by that template; texts are a user's and an assistant's message. Else prompt and
    completion as one text, with the special tokens that the tokenizer puts around it, and one end of sequence.

    Raises ValueError for a conversation without a chat template, or one that the template refuses.
    """
    if not tokenizer.chat_template:
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise ValueError("a conversation needs a chat template, which the reward model's tokenizer has not")
        ids, end = _encode(tokenizer, prompt + completion, special=True), tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]
    messages = [*_as_messages(prompt, "user"), *_as_messages(completion, "assistant")]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template is a program that raises what it likes
        raise ValueError(f"the reward model's chat template refuses the conversation: {error}") from error
    return _encode(tokenizer, text, special=False)


def _as_messages(text: str | list[dict[str, Any]], role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    """Raises ValueError for half of a surrogate pair, which JSON and broken command lines can hold: tokenizers say nothing but TypeError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise ValueError(f"a text holds {half}, half a character, expected whole ones: {ascii(text[:80])}") from error
    return tokenizer(text, add_special_tokens=special, padding=False, truncation=False, verbose=False)["input_ids"]


def _ends(ids: list[int], end: int) -> int:
    """How many of the last ids are `end`."""
    count = 0
    while count < len(ids) and ids[-1 - count] == end:
        count += 1
    return count
