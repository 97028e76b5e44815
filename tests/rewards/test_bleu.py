"""BLEU and chrF against each row's own references."""

from __future__ import annotations

import functools
import sys

import pytest

from fastppo.rewards import RewardRunner, WeightedReward, bleu, chrf, repetition

sacrebleu = pytest.importorskip("sacrebleu", reason="pip install fastppo[bleu]")

REFERENCE = "The weather is very nice today."
TEXTS = [REFERENCE, "The weather is nice today.", "very very very very very very", ""]


@pytest.mark.parametrize("reward", [bleu, chrf])
def test_nearer_is_more(reward):
    same, near, repeated, empty = reward(TEXTS, [REFERENCE] * 4)
    assert 1 >= same > 0.999 and same > near > repeated > empty == 0


@pytest.mark.parametrize("reward", [bleu, chrf])
def test_the_figures_are_sacrebleus(reward):
    references = [REFERENCE, "It is fine weather today."]
    scores = reward(TEXTS[1:3], [references, REFERENCE])
    score = {
        bleu: functools.partial(sacrebleu.sentence_bleu, use_effective_order=True),
        chrf: sacrebleu.sentence_chrf,
    }[reward]
    assert scores == [score(TEXTS[1], references).score / 100, score(TEXTS[2], [REFERENCE]).score / 100]


@pytest.mark.parametrize("reward", [bleu, chrf])
def test_a_row_without_references_does_not_apply(reward):
    assert reward(["a b", "a b", "a b"], [None, [], ["a b"]])[:2] == [None, None]


@pytest.mark.parametrize("references", [3, [1], {"de": "x"}, [None]])
@pytest.mark.parametrize("reward", [bleu, chrf])
def test_references_of_another_kind_are_an_error_and_invalid(make, reward, references):
    with pytest.raises(TypeError, match=r"references\[1\] is .*expected a text, a list of texts or None"):
        reward(["a", "b"], ["a", references])
    result = make(reward, None, retries=0)(["p", "q"], ["a", "b"], {"references": ["a", references]})
    assert result.failures == 2


def test_very_very_very_loses(make):
    """The sum that a policy is trained on prefers a plain sentence, whatever else is said over and over."""
    runner = make([bleu, WeightedReward(repetition, weight=0.5)], None)
    texts = ["The weather is nice.", "very very very", "very " * 40, "the the the the", "today today today", "!!!!!!!!"]
    result = runner(["p"] * len(texts), texts, {"references": [REFERENCE] * len(texts)})
    assert result.errors == [] and all(result.scores[0] > 0 > other for other in result.scores[1:])


def test_options_are_checked_when_the_runner_is_made():
    for reward, message in (
        (functools.partial(bleu, tokenize="14a"), "reward 'bleu': tokenize is '14a', expected one of 13a"),
        (functools.partial(chrf, word_order=-1), "reward 'chrf': word_order is -1, expected an integer >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            RewardRunner(reward, timeout=None)


def test_chrf_plus_plus():
    plain, plus = chrf(TEXTS[1:2], [REFERENCE]), chrf(TEXTS[1:2], [REFERENCE], word_order=2)
    assert plus == [sacrebleu.sentence_chrf(TEXTS[1], [REFERENCE], word_order=2).score / 100] != plain


def test_without_sacrebleu(monkeypatch):
    sys.modules[bleu.__module__]._bleu.cache_clear()
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ImportError, match=r"bleu.* needs? .*pip install fastppo\[bleu\]"):
        RewardRunner(bleu, timeout=None)
