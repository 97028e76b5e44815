"""Stop strings, with tokens that are single bytes: a string may span tokens and a character too."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastppo.rollout import Engine, FinishReason, SamplingParams
from fastppo.rollout.stopping import StopStrings
from tests.rollout.tiny import make_chain

STOP, LENGTH, _ = (int(reason) for reason in FinishReason)


@pytest.fixture(scope="module")
def tokenizer():
    """One token for each byte, and the special token <end>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<end>")


def _first_stop(tokenizer, text: str, *strings: str) -> str | None:
    """The text up to and with the token at which the check fires."""
    check, tokens = StopStrings(tokenizer, strings), tokenizer.encode(text)
    for i in range(1, len(tokens) + 1):
        if check.completed_by_last(tokens[:i]):
            return tokenizer.decode(tokens[:i])
    return None


def test_string_over_several_tokens(tokenizer):
    assert _first_stop(tokenizer, "so: the end. not here", "end.") == "so: the end."
    assert _first_stop(tokenizer, "nothing of the kind", "END") is None


def test_first_of_several_strings(tokenizer):
    assert _first_stop(tokenizer, "a, b; c", ";", ",") == "a,"


def test_characters_of_several_tokens(tokenizer):
    assert len(tokenizer.encode("é€😀")) == 9
    assert _first_stop(tokenizer, "price: 5€ and more €", "€") == "price: 5€"
    assert _first_stop(tokenizer, "x" * 50 + "😀é tail", "😀é") == "x" * 50 + "😀é"


def test_special_tokens_are_text(tokenizer):
    assert _first_stop(tokenizer, "one<end>two", "<end>") == "one<end>"


def test_string_that_was_there_before_does_not_count(tokenizer):
    check, tokens = StopStrings(tokenizer, ("\n",)), tokenizer.encode("a\nb")
    assert not check.completed_by_last(tokens)
    assert check.completed_by_last(tokenizer.encode("a\nb\n"))


def _chain_of(tokenizer, text: str):
    """A model that writes `text` (no character twice) after its first character, then <end>."""
    tokens = [*tokenizer.encode(text), len(tokenizer) - 1]
    successors = [len(tokenizer) - 1] * len(tokenizer)
    for token, following in zip(tokens, tokens[1:], strict=False):
        successors[token] = following
    model = make_chain(successors)
    model.generation_config.eos_token_id = len(tokenizer) - 1
    return model, tokens[:1]


def test_engine_keeps_the_tokens_up_to_the_one_that_completes_the_string(tokenizer):
    model, prompt = _chain_of(tokenizer, "abcdefgh")
    engine = Engine(model, tokenizer)
    for params, text, reason in [
        (dict(stop_strings=("de", "xyz")), "bcde", STOP),
        (dict(stop_strings=("de",), max_new_tokens=4), "bcde", STOP),
        (dict(stop_strings=("de",), max_new_tokens=3), "bcd", LENGTH),
        (dict(stop_strings=("de",), min_new_tokens=5), "bcdefgh<end>", STOP),
        (dict(stop_strings=("<end>",), ignore_eos=True), "bcdefgh<end>", STOP),
    ]:
        rollout = engine.generate([prompt], SamplingParams(temperature=0, **params))
        assert (tokenizer.decode(rollout.completions()[0]), rollout.finish_reasons.item()) == (text, reason), params


def test_the_prompt_is_not_searched(tokenizer):
    model, _ = _chain_of(tokenizer, "abcdefgh")
    rollout = Engine(model, tokenizer).generate(["de"], SamplingParams(temperature=0, stop_strings=("de", "ef")))
    assert tokenizer.decode(rollout.completions()[0]) == "fgh<end>"


def test_only_the_sequence_with_the_string_stops(tokenizer):
    model, _ = _chain_of(tokenizer, "abcdefgh")
    params = SamplingParams(temperature=0, stop_strings=("cd",))
    rollout = Engine(model, tokenizer, max_batch_size=2).generate(["a", "e", "b"], params)
    assert [tokenizer.decode(c) for c in rollout.completions()] == ["bcd", "fgh<end>", "cd"]
    assert torch.equal(rollout.finish_reasons, torch.zeros(3, dtype=torch.int8))
