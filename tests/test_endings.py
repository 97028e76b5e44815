"""What ends a completion: every place that names a token counts, and a run says which ones do."""

from __future__ import annotations

import re

import pytest

from fastppo import PPOTrainer
from fastppo.cli import main
from fastppo.console import Reporter
from fastppo.model.endings import ending_ids, find_turn_end
from fastppo.rollout import Engine, FinishReason, SamplingParams
from tests.rollout.tiny import make_chain, make_model
from tests.tiny import LETTERS, make_tokenizer
from tests.tiny_trainer import count_a, tiny_config

EOS, END, OTHER = 1, 18, 19  # <eos>, <|im_end|>, <|other|> of the tokenizer below
VOCAB_SIZE = 20
A, B, C = (2 + LETTERS.index(letter) for letter in "abc")
QUESTION = "{% for m in messages %}{% if m.role == 'user' %}<|other|>{{ m.content }}{% else %}"
CLOSE = "{% endif %}{% endfor %}"
CHATML = QUESTION + "<|other|>{{ m.content }}<|im_end|>\n" + CLOSE


def chat_tokenizer(template: str | None = None, *, special: bool = True):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|im_end|>", "<|other|>"], special_tokens=special)
    tokenizer.chat_template = template
    return tokenizer


def chain(**successors: int):
    """a -> b -> c -> a ..., but for what `successors` says of a letter."""
    follow = [A] * VOCAB_SIZE
    follow[A], follow[B], follow[C] = B, C, A
    for letter, token in successors.items():
        follow[2 + LETTERS.index(letter)] = token
    model = make_chain(follow)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    return model


def name_in(place: str, model, tokenizer, token: int) -> None:
    """Make one place alone name `token` as an end."""
    tokenizer.eos_token = None
    if place == "generation config":
        model.generation_config.eos_token_id = [97, token, -1]  # the others can never be drawn
    elif place == "model config":
        model.config.eos_token_id = token
    elif place == "tokenizer":
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(token)
    else:
        tokenizer.chat_template = CHATML


PLACES = ["generation config", "model config", "tokenizer", "chat template"]


class TestPlaces:
    @pytest.mark.parametrize("place", PLACES)
    def test_each_ends_the_engines_completions(self, place):
        model, tokenizer = chain(c=END), chat_tokenizer()
        name_in(place, model, tokenizer, END)
        rollout = Engine(model, tokenizer).generate([[A]], SamplingParams(temperature=0, max_new_tokens=8))
        assert rollout.completions() == [[B, C, END]]
        assert rollout.finish_reasons.tolist() == [FinishReason.STOP]
        assert ending_ids(model, tokenizer) == {END: [place]}

    def test_all_together(self):
        """An instruct model whose generation config knows its family's end of text only."""
        model, tokenizer = chain(), chat_tokenizer(CHATML)
        model.generation_config.eos_token_id = EOS
        assert ending_ids(model, tokenizer) == {EOS: ["generation config", "tokenizer"], END: ["chat template"]}
        assert list(ending_ids(model, None)) == [EOS]

    def test_the_class_default_of_a_config_does_not_count_beside_a_generation_config(self):
        """A config.json that names none gives 2 in a Llama, whatever token that is."""
        model = chain()
        model.config.eos_token_id, model.generation_config.eos_token_id = A, END
        assert list(ending_ids(model, chat_tokenizer())) == [END, EOS]

    def test_ignore_eos_and_stop_token_ids(self):
        engine = Engine(chain(c=END, b=C), chat_tokenizer(CHATML))
        params = dict(temperature=0, max_new_tokens=5, ignore_eos=True)
        assert engine.generate([[A]], SamplingParams(**params)).completions() == [[B, C, END, A, B]]
        assert engine.generate([[A]], SamplingParams(**params, stop_token_ids=[C])).completions() == [[B, C]]


# How the families close the assistant's turn, in a few words each.
TEMPLATES = {
    "chatml": (CHATML, END),
    "end of text only": (QUESTION + "{{ m.content }}{{ eos_token }}" + CLOSE, EOS),
    "a space first": (QUESTION + " {{ m.content }} <eos>" + CLOSE, EOS),
    "turn, then text": (QUESTION + "{{ m.content | trim }}<|im_end|>\n" + CLOSE + "<eos>", END),
    "a text, then a token": (QUESTION + "{{ m.content }}\n###<|im_end|>" + CLOSE, END),
    "thoughts before": (QUESTION + "<|other|>\n\n<|other|>{{ m.content }}<|im_end|>\n" + CLOSE, END),
    # gpt-oss: a message inside an answer ends with the token that ends an earlier turn.
    "last turn alone": (QUESTION + "{{ m.content }}{% if loop.last %}<|im_end|>{% else %}<|other|>{% endif %}" + CLOSE, END),
    "named templates": ({"default": CHATML, "tool_use": "<|other|>"}, END),
    "a text": (QUESTION + "{{ m.content }}\n### End\n" + CLOSE, None),
    "nothing": (QUESTION + "{{ m.content }}" + CLOSE, None),
    "no answer": ("{% for m in messages %}{{ m.role }}<|im_end|>{% endfor %}", None),
    "parts": ("{% for m in messages %}{{ m.content[0].text }}<|im_end|>{% endfor %}", None),
    "refuses": ("{{ raise_exception('no') }}", None),
    "none": (None, None),
}  # fmt: skip


@pytest.mark.parametrize("special", [True, False], ids=["special", "added"])
@pytest.mark.parametrize("case", TEMPLATES)
def test_the_end_of_a_turn(case, special):
    template, expected = TEMPLATES[case]
    found = find_turn_end(chat_tokenizer(template, special=special))
    assert (None if found is None else found.token) == expected


def test_white_space_among_the_added_tokens_is_no_end():
    tokenizer = chat_tokenizer(CHATML.replace("<|im_end|>", "\n\n<|im_end|>"))
    tokenizer.add_tokens(["\n\n"])
    assert find_turn_end(tokenizer).token == END


class Lines(Reporter):
    """Keeps what a run says."""

    def __init__(self) -> None:
        super().__init__(1, quiet=True)
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def _run(path, model, tokenizer, **changes) -> list[str]:
    """What a run of one step says."""
    settings = {"total_steps": 1, "rollout__max_new_tokens": 5, "rollout__prompts_per_step": 2} | changes
    config, reporter = tiny_config(path / "run", **settings), Lines()
    prompts = [[{"role": "user", "content": "a"}]] if tokenizer.chat_template else ["a"]
    trainer = PPOTrainer(model, reward=count_a, prompts=prompts, config=config, tokenizer=tokenizer, reporter=reporter)
    trainer.train()
    return reporter.lines


class TestWhatARunSays:
    def test_what_ends_a_completion(self, tmp_path):
        lines = _run(tmp_path, chain(c=END), chat_tokenizer(CHATML), rollout__stop_strings=("pp",))
        assert lines == ["a completion ends with <eos> (1), <|im_end|> (18) or the text 'pp'"]

    def test_settings_decide(self, tmp_path):
        lines = _run(tmp_path, chain(c=END), chat_tokenizer(), rollout__ignore_eos=True, rollout__stop_token_ids=(END,))
        assert lines == ["a completion ends with <|im_end|> (18)"]

    # (the chat template, settings) -> the reason that is named, of a model that goes on for ever
    cut_off = {
        "nothing ends one": (None, dict(rollout__ignore_eos=True), r"nothing ends one; rollout\.stop_token_ids"),
        "a text closes turns": (TEMPLATES["a text"][0], {}, r"closes a turn with '### End'.*rollout\.stop_strings"),
        "a special token": (None, {}, r"<\|other\|> \(19\) stands in 2 of them and ends none; rollout\.stop_token_ids"),
        "longer answers": (CHATML, {}, "their answers are longer, or the model has not learned to end them"),
    }

    @pytest.mark.parametrize("case", cut_off)
    def test_why_most_of_the_first_rollout_was_cut_off(self, case, tmp_path):
        template, settings, reason = self.cut_off[case]
        model = chain(b=OTHER) if case == "a special token" else chain()
        lines = _run(tmp_path, model, chat_tokenizer(template), total_steps=2, **settings)
        warnings = [line for line in lines if "cut off" in line]
        assert len(warnings) == 1, "said once, after the first rollout"
        assert re.search(f"2 of 2 completions were cut off at max_new_tokens = 5: .*{reason}", warnings[0])

    def test_nothing_where_half_ended(self, tmp_path):
        tokenizer, model = chat_tokenizer(), chain(c=EOS, d=2 + LETTERS.index("e"), e=2 + LETTERS.index("d"))
        config, reporter = tiny_config(tmp_path / "run", total_steps=1, rollout__prompts_per_step=2), Lines()
        PPOTrainer(
            model, reward=count_a, prompts=["a", "d"], config=config, tokenizer=tokenizer, reporter=reporter
        ).train()
        assert not [line for line in reporter.lines if "cut off" in line]


def test_info_of_a_model(tmp_path, capsys):
    chain().save_pretrained(tmp_path)
    chat_tokenizer(CHATML).save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "LlamaForCausalLM" in out and "our kernels run them" in out
    assert "on a CPU in float32; on a GPU with rollout.exact=true" in " ".join(out.split())
    assert "<eos> (1): tokenizer" in out and "<|im_end|> (18): chat template" in out
    assert main(["info", str(tmp_path / "nowhere")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_info_says_why_a_model_runs_its_own_modules(tmp_path, capsys):
    make_model("mixtral").save_pretrained(tmp_path)
    chat_tokenizer().save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    assert "its own modules run: MixtralSparseMoeBlock consists of gate, experts" in " ".join(
        capsys.readouterr().out.split()
    )
