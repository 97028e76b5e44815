"""What reward functions read in a completion."""

from __future__ import annotations

import re
from typing import Any

MAX_ANSWER_CHARACTERS = 1000

_MARKERS = re.compile(r"\\boxed\s*\{|<answer>|####")


def text_of(completion: str | list[dict[str, Any]]) -> str:
    """A completion's text, whether it is plain or a conversation (then the last message's content)."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def final_answer(text: str) -> str | None:
    r"""The answer after the last of `#### ...` (to the end of its line), `\boxed{...}` and `<answer>...</answer>`.

    None without one. An `<answer>` that is not closed runs on; a box that is not closed (cut off) is none, and what stands before it
    counts. No answer is longer than `MAX_ANSWER_CHARACTERS`, so that no text takes long to read.
    """
    for marker in reversed(list(_MARKERS.finditer(text))):
        rest = text[marker.end() : marker.end() + MAX_ANSWER_CHARACTERS]
        if marker[0].endswith("{"):
            content = _inside_braces(rest)
        else:
            content = re.split(r"</answer>" if marker[0] == "<answer>" else r"</answer>|\n", rest, maxsplit=1)[0]
        if content is not None:
            return content.strip()
    return None


def _inside_braces(text: str) -> str | None:
    """What comes before the brace that closes the one just read."""
    depth = 1
    for place, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:place]
    return None
