"""Tokenizers of one token a character, with and without a chat template, for the tests of prompts."""

from __future__ import annotations

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'alien' %}{{ raise_exception('no aliens') }}{% endif %}"
    "{{ '<s>' if loop.first else '' }}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def tokenizer():
    """One token a character, `<s>` before every text."""
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *map(chr, range(32, 127)), "\n"])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def spelled(tokenizer, row):
    """The tokens of a row's prompt."""
    return tokenizer.convert_ids_to_tokens(row["prompt_ids"])


def user(text):
    """A conversation of one message."""
    return [{"role": "user", "content": text}]
