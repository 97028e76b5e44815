"""Ids that a model can draw and its tokenizer has no token for: everything that decodes leaves them out."""

from __future__ import annotations

import pytest
from transformers import ByT5Tokenizer

from fastppo import PPOTrainer
from fastppo.cli import main
from fastppo.console import Reporter
from fastppo.model.decoding import decodable, decode
from fastppo.rollout import Engine, SamplingParams
from tests.rollout.tiny import make_chain
from tests.tiny import make_tokenizer
from tests.tiny_trainer import tiny_config

A, B, EOS = 100, 101, 1  # of ByT5: bytes begin at 3, and 384 is the first id without a token
BEYOND = 390
SIZE = 400


class Bytes(ByT5Tokenizer):
    """Fails as other tokenizers written in Python do: that of `error`, or by a token that is None."""

    error: type[Exception] | None = None

    def _convert_id_to_token(self, index):
        if index < 384:
            return super()._convert_id_to_token(index)
        if self.error is not None:
            raise self.error(index)
        return None


def _tokenizer(case: str):
    if case == "ByT5":
        return ByT5Tokenizer()
    tokenizer = Bytes()
    tokenizer.error = {"IndexError": IndexError, "KeyError": KeyError, "None": None}[case]
    return tokenizer


CASES = ["ByT5", "IndexError", "KeyError", "None"]


def _chain(*, end: int = EOS):
    """a -> an id without a token -> b -> end"""
    follow = [EOS] * SIZE
    follow[A], follow[BEYOND], follow[B] = BEYOND, B, end
    model = make_chain(follow, gap=40.0)
    model.generation_config.eos_token_id = model.config.eos_token_id = EOS
    return model


@pytest.mark.parametrize("case", CASES)
class TestIdsWithoutAToken:
    def test_text(self, case):
        tokenizer = _tokenizer(case)
        assert decode(tokenizer, [A, BEYOND, B, EOS], skip_special_tokens=True) == "ab"
        assert decode(tokenizer, [A, B, BEYOND, EOS], skip_special_tokens=False) == "ab</s>"
        assert decode(tokenizer, [BEYOND], skip_special_tokens=True) == ""
        assert decodable(tokenizer, [A, BEYOND, B]) == [A, B]

    def test_stop_strings(self, case):
        engine = Engine(_chain(end=A), _tokenizer(case))
        rollout = engine.generate([[B]], SamplingParams(temperature=0, max_new_tokens=9, stop_strings=["ab"]))
        assert rollout.completions() == [[A, BEYOND, B]]

    def test_rewards_get_texts(self, case, tmp_path):
        seen = []

        def reward(prompts, completions, **_):
            seen.extend(completions)
            return [1.0 for _ in completions]

        config = tiny_config(tmp_path / "run", total_steps=1, rollout__prompts_per_step=2)
        PPOTrainer(
            _chain(), reward=reward, prompts=["a"], config=config, tokenizer=_tokenizer(case),
            reporter=Reporter(1, quiet=True),
        ).train()  # fmt: skip
        assert seen == ["b", "b"]


@pytest.mark.parametrize("prompts", [["a"], ["a", "ba"]], ids=["streamed", "several"])
def test_on_the_command_line(prompts, tmp_path, capsys):
    _chain().save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    arguments = [x for prompt in prompts for x in ("--prompt", prompt)]
    assert main(["generate", str(tmp_path), "--temperature", "0", "--max-new-tokens", "4", *arguments]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "b"


def test_what_a_tokenizer_can_decode_is_decoded_as_before():
    tokenizer = make_tokenizer()
    assert decode(tokenizer, [2, 99, 3, 1], skip_special_tokens=True) == "ab"
    assert decode(tokenizer, [2, 1], skip_special_tokens=False) == "a<eos>"


def test_errors_that_no_id_explains_are_shown():
    class Broken(ByT5Tokenizer):
        def convert_tokens_to_string(self, tokens):
            if len(tokens) > 1:
                raise RuntimeError("broken")
            return super().convert_tokens_to_string(tokens)

    with pytest.raises(RuntimeError, match="broken"):
        decode(Broken(), [A, B], skip_special_tokens=True)
