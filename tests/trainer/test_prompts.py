"""Prompts as the trainer takes them: what the model cannot read is named when the trainer is made, and data settings reach it."""

from __future__ import annotations

import pytest

from fastppo.data import load_prompts
from fastppo.recipe_config import DataConfig
from tests.tiny import LETTERS, make_model, make_tokenizer


@pytest.mark.parametrize("argument", ["prompts", "eval_prompts"])
def test_a_token_that_the_model_does_not_know_is_named_at_construction(make_trainer, argument):
    """A tokenizer of more letters than the model has rows in its embedding."""
    small = make_model(vocab_size=len(LETTERS))
    with pytest.raises(
        ValueError, match=rf"^{argument}: the prompt of row 1 has the token 'p' with id {len(LETTERS) + 1}, .*embedding"
    ):
        make_trainer(model=small, **{"prompts": ["ab"], argument: ["ab", "ap"]})


def test_an_embedding_larger_than_the_tokenizer_is_none_the_worse(make_trainer):
    assert len(make_trainer(model=make_model(vocab_size=64)).prompts) == 8


def test_settings_of_the_data_reach_the_trainer_with_its_prompts(make_trainer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}a{{ m.content }}<eos>{% endfor %}"
    with pytest.raises(ValueError, match=r"row 0 has '<eos>', .*PPOTrainer, prompts=load_prompts\("):
        load_prompts(["abc<eos>"], tokenizer)
    prompts = load_prompts(["abc<eos>"], tokenizer, DataConfig(rendered=True))
    assert make_trainer(prompts=prompts).prompts[0]["prompt_ids"] == [2, 3, 4, 1]
