"""Prompts as the engine takes them: texts as data sets read them, a tokenizer's output without its padding, nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import BatchEncoding, ByT5Tokenizer

from fastppo.data import load_prompts
from fastppo.rollout import Engine, SamplingParams
from tests.rollout.tiny import make_chain
from tests.tiny import LETTERS, make_tokenizer

SIZE = 2 + len(LETTERS)


def _prompts_seen(prompts, tokenizer=None) -> list[list[int]]:
    model = make_chain([0] * (384 if isinstance(tokenizer, ByT5Tokenizer) else SIZE))
    return Engine(model, tokenizer).generate(prompts, SamplingParams(temperature=0, max_new_tokens=1)).prompts()


def _adding(first: str, last: str):
    tokenizer = make_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A {last}".strip(), special_tokens=[("<eos>", 1), ("<pad>", 0)]
    )
    return tokenizer


def _no_eos():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


class TestText:
    tokenizers = {
        "adds nothing": make_tokenizer,
        "adds an end": lambda: _adding("", "<eos>"),
        "adds a beginning": lambda: _adding("<pad>", ""),
        "adds both": lambda: _adding("<pad>", "<eos>"),
        "adds its end at both ends": lambda: _adding("<eos>", "<eos>"),
        "has no end": _no_eos,
        "ByT5": ByT5Tokenizer,
    }

    @pytest.mark.parametrize("case", tokenizers)
    def test_the_engine_reads_what_a_data_set_does(self, case):
        tokenizer = self.tokenizers[case]()
        ids = [row["prompt_ids"] for row in load_prompts(["ab", "cab"], tokenizer)]
        assert _prompts_seen(["ab", "cab"], tokenizer) == ids
        assert all(row[-1] != 1 for row in ids)

    def test_an_end_that_the_text_writes_itself_stays(self):
        for tokenizer in (make_tokenizer(), _adding("", "")):
            assert _prompts_seen(["a<eos>"], tokenizer) == [[2, 1]]


IDS = [[2, 3, 4], [5]]
LEFT, LEFT_MASK = [[2, 3, 4], [0, 0, 5]], [[1, 1, 1], [0, 0, 1]]
RIGHT, RIGHT_MASK = [[2, 3, 4], [5, 0, 0]], [[1, 1, 1], [1, 0, 0]]


class TestTokenizerOutput:
    taken = {
        "lists": dict(input_ids=IDS),
        "lists and masks": BatchEncoding(dict(input_ids=IDS, attention_mask=[[1, 1, 1], [1]])),
        "left": dict(input_ids=torch.tensor(LEFT), attention_mask=torch.tensor(LEFT_MASK)),
        "right": BatchEncoding(dict(input_ids=torch.tensor(RIGHT), attention_mask=torch.tensor(RIGHT_MASK))),
        "padded lists": dict(input_ids=LEFT, attention_mask=LEFT_MASK, token_type_ids=RIGHT_MASK),
        "arrays": dict(input_ids=np.array(RIGHT), attention_mask=np.array(RIGHT_MASK, dtype=bool)),
        "list of tensors": dict(input_ids=[torch.tensor(row) for row in IDS]),
        "a list of them": [dict(input_ids=[2, 3, 4]), BatchEncoding(dict(input_ids=torch.tensor([5])))],
        "a list of them, padded": [dict(input_ids=LEFT[i], attention_mask=LEFT_MASK[i]) for i in (0, 1)],
    }

    @pytest.mark.parametrize("case", taken)
    def test_what_is_right_in_it(self, case):
        assert _prompts_seen(self.taken[case], make_tokenizer()) == IDS

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_of_a_real_call(self, side):
        tokenizer = make_tokenizer()
        tokenizer.padding_side = side
        encoded = tokenizer(["abc", "d"], padding=True, return_tensors="pt")
        assert _prompts_seen(encoded, tokenizer) == IDS

    def test_of_a_chat_template(self):
        tokenizer = make_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        conversations = [[{"role": "user", "content": text}] for text in ("abc", "d")]
        assert _prompts_seen(tokenizer.apply_chat_template(conversations), tokenizer) == IDS
        assert _prompts_seen([tokenizer.apply_chat_template(c) for c in conversations], tokenizer) == IDS

    refused = {
        "rows": (dict(prompt=["a"]), TypeError, "prompts is a mapping with the keys 'prompt', expected a tokenizer's output"),
        "empty": ({}, TypeError, r"prompts is a mapping with the keys \(none\)"),
        "embeddings": (dict(inputs_embeds=torch.zeros(1, 2, 3)), TypeError, "'inputs_embeds'"),
        "pictures": (dict(input_ids=IDS, pixel_values=torch.zeros(1)), TypeError, "'input_ids', 'pixel_values'"),
        "ids are text": (dict(input_ids="abc"), TypeError, "expected a tokenizer's output"),
        "one prompt": (dict(input_ids=[2, 3], attention_mask=[1, 1]), TypeError, "holds the ids of a single prompt"),
        "one prompt, no mask": (dict(input_ids=[2, 3]), TypeError, r"prompts\[0\] is 2, expected a text or a list"),
        "hole": (dict(input_ids=[[2, 3, 4]], attention_mask=[[1, 0, 1]]), ValueError, r"prompts\[0\] has zeros between"),
        "short mask": (dict(input_ids=[[2, 3]], attention_mask=[[1]]), ValueError, r"attention_mask of prompts\[0\]"),
        "few masks": (dict(input_ids=IDS, attention_mask=[[1, 1, 1]]), ValueError, "has 1 rows, expected 2"),
        "all padding": (dict(input_ids=LEFT, attention_mask=[[1, 1, 1], [0, 0, 0]]), ValueError, r"prompts\[1\] is empty"),
        "padded, no mask": (dict(input_ids=torch.tensor(LEFT)), ValueError, r"prompts\[1\] begins or ends with padding"),
        "a message": ([{"role": "user", "content": "a"}], TypeError, r"prompts\[0\] is a mapping with the keys 'role', 'content'"),
        "a conversation": ([[{"role": "user", "content": "a"}]], TypeError, r"prompts\[0\] holds \{'role'"),
    }  # fmt: skip

    @pytest.mark.parametrize("case", refused)
    def test_the_rest_is_refused_by_name(self, case):
        prompts, error, message = self.refused[case]
        with pytest.raises(error, match=message):
            _prompts_seen(prompts, make_tokenizer())


class TestOtherKinds:
    @pytest.mark.parametrize(
        "prompts, message",
        [
            ({(2, 3)}, "prompts is set, expected a list of texts"),
            (b"ab", "prompts is bytes"),
            (iter([[2]]), "prompts is list_iterator"),
            (3, "prompts is 3,"),
            (None, "prompts is NoneType"),
            (torch.tensor(3), "prompts is Tensor"),
            ([2, 3], r"prompts\[0\] is 2, expected a text or a list of token ids"),
            ([torch.tensor(3)], r"prompts\[0\] is Tensor"),
            ([{2, 3}], r"prompts\[0\] is set"),
            ([b"ab"], r"prompts\[0\] is bytes"),
            ([None], r"prompts\[0\] is NoneType"),
            ([[True, True]], r"prompts\[0\] holds True"),
            (torch.zeros(1, 2), r"prompts\[0\] holds 0\.0"),
            (torch.zeros(1, 2, 3, dtype=torch.int64), r"prompts\[0\] holds \[0, 0, 0\]"),
        ],
    )
    def test_are_refused_by_name(self, prompts, message):
        with pytest.raises(TypeError, match=message):
            _prompts_seen(prompts)


class TestPaddedTensors:
    """Only a mask can say what of a rectangle is padding: without one nothing is guessed."""

    @pytest.mark.parametrize("make", [torch.tensor, np.array])
    @pytest.mark.parametrize("rows", [LEFT, RIGHT, [[0, 0, 2]], [[2, 3, 0]]])
    def test_are_refused(self, make, rows):
        with pytest.raises(ValueError, match=r"prompts\[[01]\] begins or ends with padding.*attention_mask"):
            _prompts_seen(make(rows), make_tokenizer())

    def test_by_the_models_own_padding_too(self):
        model = make_chain([0] * SIZE)
        model.config.pad_token_id = 0
        with pytest.raises(ValueError, match="begins or ends with padding"):
            Engine(model).generate(torch.tensor(LEFT), SamplingParams(max_new_tokens=1))

    @staticmethod
    def _padding_with_eos():
        tokenizer = make_tokenizer()
        tokenizer.pad_token = tokenizer.bos_token = "<eos>"
        return tokenizer

    def test_one_token_with_which_all_rows_begin_is_no_padding(self):
        """GPT-2 begins, ends and pads with one token."""
        rows = [[1, 2, 3], [1, 4, 5]]
        assert _prompts_seen(torch.tensor(rows), self._padding_with_eos()) == rows

    @pytest.mark.parametrize("rows", [[[1, 2, 3], [1, 1, 4]], [[2, 3], [1, 4]], [[2, 3], [4, 1]], [[1, 1, 2]]])
    def test_more_of_it_is(self, rows):
        with pytest.raises(ValueError, match="begins or ends with padding"):
            _prompts_seen(torch.tensor(rows), self._padding_with_eos())

    def test_lists_say_themselves_what_they_hold(self):
        assert _prompts_seen(LEFT, make_tokenizer()) == LEFT
