"""A tokenizer of single characters with a chat template, and templates of real models as TRL keeps them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastppo.data.chat import ChatTemplate

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>"]
SPECIAL += ["<|end_header_id|>", "<|eom_id|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
CHARACTERS = [chr(i) for i in range(32, 127)] + ["\n"]
PLAIN = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}[{{ call.function.name }}]{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML in a line."""


def make_chat_tokenizer(template: str = PLAIN, end: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(".|\n"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token="<|endoftext|>", additional_special_tokens=SPECIAL
    )
    made.chat_template, made.name_or_path = template, "somebody/a-model"
    return made


def trl_template(name: str) -> str:
    trl = pytest.importorskip("trl")
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


def chat_of(tokenizer: PreTrainedTokenizerFast) -> ChatTemplate:
    return ChatTemplate(tokenizer, None)
