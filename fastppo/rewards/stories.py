"""A reward for short children's stories: they should end happily."""

from __future__ import annotations

import re
from typing import Any

from fastppo.rewards.text import text_of

WEIGHTS = {"happy": 0.5, "finished": 0.2, "varied": 0.3}

HAPPY_WORDS = frozenset(
    """best cheered fun friend friends giggled glad happily happy hug hugged hugs joy kind kissed laugh laughed laughing
    love loved loves play played proud safe smile smiled smiles smiling thankful thanked together""".split()
)
UNHAPPY_WORDS = frozenset(
    """afraid alone angry bad broke broken cried cry crying hurt lost mad sad scared unhappy upset worried
    can't couldn't didn't don't isn't never no not wasn't weren't""".split()
)
ENDING_SENTENCES = 3
SENTENCE_WORDS = 4
STORY_WORDS = 40


def happy_ending(completions: list, **columns: Any) -> list[float]:
    """A score in [0, 1] for each story: the sum of its `story_parts`, weighted by `WEIGHTS`."""
    return [_score(text_of(completion)) for completion in completions]


def _score(text: str) -> float:
    return sum(WEIGHTS[name] * value for name, value in story_parts(text).items())


def story_parts(text: str) -> dict[str, float]:
    """What the score is made of, each in [0, 1].

    happy: the share of the last three whole sentences that are happy: they hold a happy word that none of the others has claimed, no
        unhappy word, and at least four words. So neither a repeated "happy" nor a list of happy words pays.
    finished: 1 where the text ends with a sentence's end, 0 where it was cut off.
    varied: 1 where no three words in a row come again, 0 where half of them are repeats; a story of less than 40 words loses as much as
        if the missing ones were repeats.
    """
    text = text.strip()
    sentences = [_words(sentence) for sentence in re.findall(r"[^.!?]+[.!?]+", text)]
    return {
        "happy": _happy_sentences(sentences[-ENDING_SENTENCES:]) / ENDING_SENTENCES,
        "finished": float(text.rstrip("\"'”").endswith((".", "!", "?"))),
        "varied": _variety(_words(text)),
    }


def _happy_sentences(sentences: list[list[str]]) -> int:
    claimed: set[str] = set()
    for words in sentences:
        new = sorted(HAPPY_WORDS.intersection(words) - claimed)
        if new and len(words) >= SENTENCE_WORDS and UNHAPPY_WORDS.isdisjoint(words):
            claimed.add(new[0])
    return len(claimed)


def _variety(words: list[str]) -> float:
    triples = list(zip(words, words[1:], words[2:], strict=False))
    different = len(set(triples)) / max(len(triples), STORY_WORDS - 2)
    return max(0.0, 2 * different - 1)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower().replace("’", "'"))
