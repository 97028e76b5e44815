"""Stop strings: found on the host, in the text of a completion's last tokens."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

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
        return self._tokenizer.decode(tokens, skip_special_tokens=False)
