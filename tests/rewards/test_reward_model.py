"""A sequence-classification model as the reward: the scores that the model gives one text at a time, or none with the reason."""

from __future__ import annotations

import copy
import math
import os
import re

import pytest
import torch

from fastppo.recipe import resolve_rewards
from fastppo.recipe_config import RecipeRewardConfig, RewardFunctionConfig
from fastppo.rewards import RewardModel, RewardRunner
from fastppo.rewards.reward_model import _batches
from tests.tiny import LETTERS, make_model, make_reward_model, make_tokenizer
from tests.tolerance import assert_as_exact_as_model, assert_rounds_to

PROMPTS = ["ab", "c", "dddd", "", "abcdefgh"]
TEXTS = ["cd", "abcdefghijk", "", "p", "nnn"]
TEMPLATE = "{% for m in messages %}{{ {'user': 'm', 'assistant': 'n'}[m['role']] + m['content'] }}{% endfor %}p"


def chatty(letters=LETTERS):
    tokenizer = make_tokenizer(letters)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def one_by_one(model, tokenizer, texts):
    """fp32 [B]: unpadded, as Transformers scores one text."""
    ids = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
    with torch.no_grad():
        return torch.stack([model.eval()(one).logits[0, 0] for one in ids])


def check(scores, model, tokenizer, texts):
    native, exact = one_by_one(model, tokenizer, texts), one_by_one(copy.deepcopy(model).double(), tokenizer, texts)
    assert native.unique().numel() == len(texts), "texts that score alike prove nothing"
    assert_as_exact_as_model(torch.tensor(scores), native, exact)


@pytest.mark.parametrize("tokens_per_batch", [1, 20, 16384])
@pytest.mark.parametrize("pad", [0, 1, None, -1], ids=["pad", "pad is eos", "no pad", "pad of no token"])
def test_scores_are_those_of_each_text_by_itself(tokens_per_batch, pad):
    """Whatever it is padded with: a model whose pad token is eos scores the token before it, batched or not."""
    model, tokenizer = make_reward_model(pad_token_id=pad), make_tokenizer()
    model.train()
    score = RewardModel(model, tokenizer, tokens_per_batch=tokens_per_batch)
    scores = score(PROMPTS, TEXTS)
    assert model.training and model.config.pad_token_id == pad and model.config.use_cache is True
    if pad == -1:
        model.config.pad_token_id = None
    check(scores, model, tokenizer, [p + t + "<eos>" for p, t in zip(PROMPTS, TEXTS, strict=True)])


def test_texts_go_through_its_own_chat_template():
    model, tokenizer = make_reward_model(), chatty()
    conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    with RewardRunner(RewardModel(model, tokenizer), timeout=None) as runner:
        of_texts, of_conversations = runner(PROMPTS, TEXTS, {}), runner(conversations, TEXTS, {})
    assert of_texts.errors == [] and of_texts.scores == of_conversations.scores
    check(of_texts.scores, model, tokenizer, [f"m{p}n{t}p" for p, t in zip(PROMPTS, TEXTS, strict=True)])


def test_it_reads_by_a_vocabulary_of_its_own():
    """The same letters under other ids: what the policy calls them does not matter."""
    tokenizer = make_tokenizer(LETTERS[::-1])
    model = make_reward_model()
    check(RewardModel(model, tokenizer)(["ab"] * 2, ["c", "d"]), model, tokenizer, ["abc<eos>", "abd<eos>"])


def test_what_has_no_score_says_why():
    model, tokenizer = make_reward_model(max_position_embeddings=8), make_tokenizer()
    tokenizer.add_tokens(["z"])  # which the model has no embedding for
    with RewardRunner(RewardModel(model, tokenizer), timeout=None) as runner:
        result = runner(["a", "a", "a", "a" * 8], ["b" * 6, "b" * 7, "z", "b"], {})
        chat = runner([[{"role": "user", "content": "a"}]], ["b"], {})
    assert math.isfinite(result.scores[0]) and all(map(math.isnan, result.scores[1:])) and result.failures == 3
    assert len(result.errors) == 2
    assert re.search(
        r"longer than the 8 tokens .* for 2 of 4 completions, the first of them number 1", result.errors[0]
    )
    assert re.search(r"no embedding for\) for 1 of 4 completions, the first of them number 2", result.errors[1])
    assert math.isnan(chat.scores[0]) and "needs a chat template" in chat.errors[0]


def test_what_the_tokenizer_says_of_its_length_counts():
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 6
    assert [math.isnan(s) for s in RewardModel(make_reward_model(), tokenizer)(["a"] * 2, ["bbbb", "bbbbb"])] == [
        False,
        True,
    ]


def test_a_conversation_that_the_template_refuses_has_no_score():
    tokenizer = chatty()
    tokenizer.chat_template = "{{ raise_exception('no user') }}"
    with RewardRunner(RewardModel(make_reward_model(), tokenizer), timeout=None) as runner:
        assert "template refuses the conversation: no user" in runner(["a"], ["b"], {}).errors[0]


def test_a_score_that_is_no_number_is_invalid():
    model = make_reward_model()
    torch.nn.init.constant_(model.score.weight, math.nan)
    with RewardRunner(RewardModel(model, make_tokenizer()), timeout=None) as runner:
        result = runner(["a"], ["b"], {})
    assert result.failures == 1 and "NaN or infinity" in result.errors[0]


def test_an_ensemble_is_mean_minus_deviations():
    models = [make_reward_model(seed) for seed in range(3)]
    by_model = torch.tensor([RewardModel(model, make_tokenizer())(PROMPTS, TEXTS) for model in models]).double()
    mean, std = by_model.mean(0), by_model.std(0, unbiased=False)
    for k in (0.0, 1.5):
        scores = RewardModel(models, make_tokenizer(), std_penalty=k)(PROMPTS, TEXTS)
        assert_rounds_to(torch.tensor(scores, dtype=torch.float64), mean - k * std)


def test_an_ensemble_has_no_score_where_a_member_has_none():
    short = make_reward_model(max_position_embeddings=4)
    scores = RewardModel([make_reward_model(), short], make_tokenizer())(["a", "a"], ["b", "bbbb"])
    assert [math.isnan(score) for score in scores] == [False, True]


def test_it_runs_in_this_process_beside_text_rewards_in_theirs():
    def process(completions):
        return [float(os.getpid())] * len(completions)

    with RewardRunner([RewardModel(make_reward_model(), make_tokenizer()), process], timeout=20) as runner:
        for _ in range(2):
            result = runner(PROMPTS, TEXTS, {"level": [1] * 5})
            assert result.errors == [] and result.by_name["process"][0] != os.getpid()
            assert result.by_name["reward_model"] == RewardModel(make_reward_model(), make_tokenizer())(PROMPTS, TEXTS)


@pytest.fixture
def folder(tmp_path):
    make_reward_model().save_pretrained(tmp_path / "rm")
    make_tokenizer().save_pretrained(tmp_path / "rm")
    return tmp_path / "rm"


def of_recipe(**arguments):
    config = RewardFunctionConfig(function="reward_model", weight=2.0, arguments=arguments)
    return resolve_rewards(RecipeRewardConfig(functions=[config]))


def test_a_recipe_names_its_folder(folder):
    with RewardRunner(of_recipe(model=str(folder), device="cpu"), timeout=20) as runner:
        result = runner(PROMPTS, TEXTS, {})
    expected = RewardModel(make_reward_model(), make_tokenizer())(PROMPTS, TEXTS)
    assert result.errors == [] and result.by_name == {"reward_model": expected}
    assert result.scores == [2 * score for score in expected]


def test_a_dtype_of_its_own(folder):
    scores = torch.tensor(RewardModel(folder, device="cpu", dtype="bfloat16")(PROMPTS, TEXTS), dtype=torch.bfloat16)
    model = make_reward_model()
    texts = [p + t + "<eos>" for p, t in zip(PROMPTS, TEXTS, strict=True)]
    exact = one_by_one(copy.deepcopy(model).double(), make_tokenizer(), texts)
    assert_as_exact_as_model(scores, one_by_one(model.bfloat16(), make_tokenizer(), texts), exact)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "./nowhere"}, "no such folder"),
        ({"model": "LM", "device": "cpu"}, "has num_labels = 2 .*expected 1: a model that scores"),
        ({"model": "RM", "device": "gpu"}, "device is 'gpu'"),
        ({"model": "RM", "dtype": "float31"}, "dtype is 'float31'"),
        ({"model": "RM", "std_penalty": 1}, "std_penalty is 1, but there is one model"),
        ({"model": ["RM", "RM"], "std_penalty": -1}, "std_penalty is -1, expected"),
        ({"model": "RM", "tokens_per_batch": 0}, "tokens_per_batch is 0"),
        ({"model": []}, "model is an empty list"),
        ({"model": "RM", "names": 1}, "reward_model got an unexpected keyword argument 'names'"),
        ({}, "reward_model missing a required argument: 'model'"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value.split()[0],
)
def test_a_recipe_that_cannot_be_is_refused_before_the_run(folder, tmp_path, arguments, message):
    make_model().save_pretrained(tmp_path / "lm")
    names = {"RM": str(folder), "LM": str(tmp_path / "lm")}
    model = arguments.get("model")
    if model:
        arguments = arguments | {
            "model": [names[n] for n in model] if isinstance(model, list) else names.get(model, model)
        }
    with pytest.raises(ValueError, match=f"reward.functions.0.arguments.*{message}"):
        of_recipe(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((make_reward_model(num_labels=2), make_tokenizer()), ValueError, "num_labels = 2, expected 1"),
        ((make_reward_model(), None), ValueError, "tokenizer is None"),
        ((make_reward_model(), make_tokenizer(LETTERS + "xyz")), ValueError, "has 21 tokens, expected at most 18"),
        (([make_reward_model()], [make_tokenizer()] * 2), ValueError, "tokenizer is a list of 2, expected 1"),
        ((make_reward_model(), "tokenizer"), TypeError, "tokenizer is str, expected a loaded"),
        ((len, make_tokenizer()), TypeError, "model is builtin_function_or_method"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_models_that_cannot_be(arguments, error, message):
    with pytest.raises(error, match=message):
        RewardModel(*arguments)


def test_a_language_model_whose_configuration_says_one_label_is_refused(folder, tmp_path):
    """Transformers would give it a head of random numbers."""
    make_model(num_labels=1).save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match=r"reward model .* lacks weights, .*score.weight"):
        RewardModel(tmp_path / "lm", make_tokenizer())


def test_a_loaded_model_is_not_moved():
    with pytest.raises(ValueError, match="dtype 'bfloat16', expected auto with a loaded model"):
        RewardModel(make_reward_model(), make_tokenizer(), dtype="bfloat16")


@pytest.mark.parametrize(
    ("tokens", "most", "expected"),
    [(1, 9, [[1], [0], [2], [3]]), (9, 9, [[1], [0, 2], [3]]), (20, 9, [[1, 0], [2, 3]]), (99, 3, [[1, 0, 2], [3]])],
)
def test_batches_keep_to_their_budget(tokens, most, expected):
    assert list(_batches({0: 4, 1: 9, 2: 4, 3: 4}, tokens, most)) == expected
