"""The one way from a prompt's text to token ids."""

from __future__ import annotations

import pytest
from tokenizers import processors
from transformers import ByT5Tokenizer

from fastppo.model import encode_prompt, load_tokenizer
from tests.tiny import make_tokenizer

TEXTS = ["ab", "a", "ab</s>", "</s>", "ab</s></s>", "</s>ab", ""]


def adding(single):
    """A tokenizer that puts special tokens around texts."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("before", ["", "<s> "])
@pytest.mark.parametrize("after", ["", " </s>", " </s> </s>"])
def test_an_end_of_sequence_that_the_tokenizer_appends_is_dropped_and_one_of_the_text_stays(text, before, after):
    expected = adding(before + "$A").encode(text)
    if text or before:
        assert encode_prompt(adding(before + "$A" + after), text) == expected


@pytest.mark.parametrize("text", TEXTS)
def test_a_rendered_text_gets_nothing(text):
    tokenizer = adding("<s> $A </s>")
    assert encode_prompt(tokenizer, text, rendered=True) == tokenizer.encode(text, add_special_tokens=False)


def test_byt5():
    """It ends every text with `</s>`."""
    tokenizer = ByT5Tokenizer()
    assert tokenizer.encode("hi") == [107, 108, 1] and encode_prompt(tokenizer, "hi") == [107, 108]


def test_real_tokenizer(stories_model):
    tokenizer = load_tokenizer(str(stories_model))
    assert encode_prompt(tokenizer, "Once upon a time") == [1, 403, 407, 261, 378]
    assert encode_prompt(tokenizer, "x" * 9000)[0] == 1, "without a warning of its length"


def test_half_a_character_is_named():
    with pytest.raises(ValueError, match=r"a text holds '\\ud83d', half a character, expected whole ones: 'a\\ud83d'"):
        encode_prompt(make_tokenizer(), "a\ud83d")
