"""`fastppo critic`: a critic that has learned from stored rollouts explains the first step of a run; files that cannot be used are named."""

from __future__ import annotations

import json
import math
import random
import shlex

import pytest
import torch

from fastppo import cli
from fastppo.critic_training import hold_out, returns_of, train_critic
from fastppo.recipe_config import Recipe
from fastppo.run_folder import read_metrics, read_samples, read_settings
from fastppo.stored_rollouts import Limits, as_rollout, read_rollouts
from tests.tiny import LETTERS, make_model, make_tokenizer
from tests.tiny_trainer import count_a
from tests.tolerance import assert_keeps_digits, assert_rounds_to

LENGTH = 6
PROMPTS = ["a", "bc", "o", "pi", "dl", "km", "ef", "np"]
FIRST = {
    "total_steps": 1,
    "advantage__gae_lambda": 1.0,
    "rollout__samples_per_prompt": 16,
    "rollout__min_new_tokens": LENGTH,
}


def early(text: str) -> float:
    """Share of letters of the first half of the alphabet."""
    return sum(letter in LETTERS[:8] for letter in text) / len(text)


def early_prompts(prompts, completions, **_):
    return [early(prompt) for prompt in prompts]


def rows_of(count: int, seed: int = 0, score=lambda draw, prompt, text: early(prompt)) -> list[dict]:
    """Random letters after a prompt of one or two, and what they score."""
    draw, tokenizer, rows = random.Random(seed), make_tokenizer(), []
    for _ in range(count):
        prompt, text = ("".join(draw.choices(LETTERS, k=k)) for k in (draw.choice((1, 2)), LENGTH))
        ids = {"prompt_ids": tokenizer.encode(prompt), "completion_ids": tokenizer.encode(text)}
        rows.append({"prompt": prompt, "completion": text, "score": score(draw, prompt, text), "ended": "length"} | ids)
    return rows


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def base(tmp_path) -> str:
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def recipe(base, tmp_path):
    """recipe(**settings of the critic) -> Recipe"""

    def make(**critic) -> Recipe:
        return Recipe(
            output_dir=str(tmp_path / "run"),
            device="cpu",
            model={"name": base},
            rollout={"prompts_per_step": 8, "samples_per_prompt": 4, "max_new_tokens": LENGTH},
            learner={"num_minibatches": 4},
            critic={"lr": 3e-3, "epochs": 2} | critic,
        )

    return make


HEADS = {
    "scalar": {},
    "hl-gauss": {"head": "hl-gauss", "value_range": (-0.2, 1.2), "bins": 31},
    "frozen attention": {"freeze_attention": True},
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_pretrained_critic_explains_the_first_step_of_a_run(recipe, make_trainer, tmp_path, kind):
    """Loaded by one setting; an untrained one explains nothing."""
    settings = recipe(epochs=3, **HEADS[kind])
    done = train_critic(
        settings, [write(tmp_path / "rollouts.jsonl", rows_of(600))], tmp_path / "out", note=lambda text: None
    )
    assert abs(done.before) < 0.05 and done.after > 0.3
    first, *rows = read_metrics(tmp_path / "out")
    assert len(rows) == 3 * math.ceil((600 - done.held_out) / 32), "a row for each step of each pass"
    assert first == {"step": 0, "val/explained_var": done.before} and rows[-1]["val/explained_var"] == done.after
    assert sum("val/explained_var" in row for row in rows) == 3, "after each pass"
    assert read_settings(tmp_path / "out")["output_dir"] == str(tmp_path / "out")
    first = {}
    for name, model in {"untrained": None, "pretrained": str(done.folder)}.items():
        critic = {f"critic__{key}": value for key, value in HEADS[kind].items()}
        trainer = make_trainer(
            early_prompts, prompts=PROMPTS, critic__model=model, output_dir=tmp_path / name, **critic, **FIRST
        )
        first[name] = trainer.train()["val/explained_var"]
    assert abs(first["untrained"]) < 0.05 and first["pretrained"] > 0.7


def early_completions(prompts, completions, **_):
    return [early(completion) for completion in completions]


def test_a_policy_learns_beside_a_pretrained_critic(recipe, make_trainer, tmp_path):
    """Half of the letters are early ones by chance; at learning rate 0 they stay it."""
    rows = rows_of(300, score=lambda draw, prompt, text: early(text))
    done = train_critic(recipe(), [write(tmp_path / "rollouts.jsonl", rows)], tmp_path / "out", note=lambda text: None)
    settings = FIRST | {"rollout__max_new_tokens": LENGTH, "rollout__samples_per_prompt": 4, "learner__epochs": 2}
    settings |= {"total_steps": 12, "optimizer__lr": 4e-3, "critic__lr": 1e-3, "critic__model": str(done.folder)}
    last = {}
    for name, changes in {"learns": {}, "rate 0": {"optimizer__lr": 0.0}}.items():
        folder = tmp_path / name
        make_trainer(early_completions, prompts=PROMPTS, output_dir=folder, **settings | changes).train()
        last[name] = sum(row["objective/scores"] for row in read_metrics(folder)[-3:]) / 3
    assert last["learns"] > 0.85 and 0.3 < last["rate 0"] < 0.65, last


def test_nothing_is_explained_after_shuffled_scores(recipe, tmp_path):
    """The control: the critic has learned what the completions scored, and not something else."""
    rows = rows_of(600, score=lambda draw, *texts: draw.choice((0.0, 0.2, 0.6)))
    done = train_critic(recipe(), [write(tmp_path / "rollouts.jsonl", rows)], tmp_path / "out", note=lambda text: None)
    assert done.after < 0.1


def test_nothing_is_learned_at_learning_rate_zero(recipe, tmp_path):
    rollouts = [write(tmp_path / "rollouts.jsonl", rows_of(300))]
    done = train_critic(recipe(lr=0.0), rollouts, tmp_path / "out", note=lambda text: None)
    assert done.after == done.before == 0.0


def test_it_is_trained_bitwise_alike_twice(recipe, tmp_path):
    path, found = write(tmp_path / "rollouts.jsonl", rows_of(60)), []
    for name in ("one", "two"):
        done = train_critic(recipe(epochs=1), [path], tmp_path / name, note=lambda text: None)
        found.append([(done.folder / file).read_bytes() for file in ("model.safetensors", "value_head.safetensors")])
    assert found[0] == found[1]


def test_what_a_run_has_sampled_is_what_it_learns_from(make_trainer, recipe, tmp_path):
    """samples.jsonl, token for token."""
    trainer = make_trainer(num_logged_samples=100, reward__max_failure_rate=0.9, rollout__samples_per_prompt=2)
    rollouts, collect = [], trainer._collect
    trainer._collect = lambda seed: rollouts.append(collect(seed)) or rollouts[-1]
    trainer.train()
    limits = Limits(18, 64)
    stored, others = read_rollouts([tmp_path / "run" / "samples.jsonl"], make_tokenizer(), limits)
    assert others == 0 and len(stored) == 32
    again = as_rollout(stored, torch.device("cpu"))
    for index, (answers, _) in enumerate(rollouts):
        part, rollout = again.select(range(16 * index, 16 * index + 16)), answers.rollout
        assert torch.equal(part.tokens, rollout.tokens) and torch.equal(part.action_mask, rollout.action_mask)
        assert torch.equal(part.position_ids, rollout.position_ids) and part.bounds == rollout.bounds
    assert not any("action_mask" in row for row in read_samples(tmp_path / "run"))
    done = train_critic(
        recipe(epochs=1), [tmp_path / "run" / "samples.jsonl"], tmp_path / "out", note=lambda text: None
    )
    assert done.held_out >= 1


def test_returns_are_discounted_scores_and_a_missing_end_is_charged(recipe):
    settings = recipe()
    settings.advantage.gamma, settings.reward.missing_eos_penalty = 0.5, 1.0
    rows = [
        {"prompt_ids": [2], "completion_ids": [3, 4, 5], "score": 2.0, "ended": "stop"},
        {
            "prompt_ids": [2],
            "completion_ids": [3, 9, 5],
            "score": 2.0,
            "action_mask": [True, False, True],
            "ended": "length",
        },
    ]
    stored = [_stored(row) for row in rows]
    assert returns_of(stored, settings, torch.device("cpu")).tolist() == [0.5, 1.0, 2.0, 0.5, 1.0]
    rollout = as_rollout(stored, torch.device("cpu"))
    assert rollout.actions.tolist() == [1, 2, 3, 5, 7] and rollout.finish_reasons.tolist() == [0, 1]
    settings.advantage.gamma = 0.97
    exact = torch.tensor([2 * 0.97**2, 2 * 0.97, 2.0, 0.97, 1.0], dtype=torch.float64)
    assert_keeps_digits(returns_of(stored, settings, torch.device("cpu")), exact)


def _stored(row):
    from fastppo.stored_rollouts import _stored as checked

    return checked("here", row, make_tokenizer(), Limits(18, 64))


def test_held_out_prompts_are_nobodys_teacher():
    stored = [_stored(row) for row in rows_of(300)]
    train, held_out = hold_out(stored, seed=4)
    prompts = [{tuple(row.prompt_ids) for row in side} for side in (train, held_out)]
    assert not prompts[0] & prompts[1] and len(train) + len(held_out) == 300
    assert_rounds_to(torch.tensor(len(prompts[1]) / 1.0), float(int(0.1 * (len(prompts[0]) + len(prompts[1])))))
    with pytest.raises(ValueError, match="hold one prompt, expected at least two"):
        hold_out([stored[0]] * 3, seed=0)


GOOD = {"prompt_ids": [2, 3], "completion_ids": [4, 5], "score": 1.0}
BAD = {
    "line 2 has no score": {"prompt_ids": [2], "completion_ids": [3]},
    "line 2 has no prompt_ids": {"prompt": "a", "completion": "b", "score": 1.0},
    "line 2: completion_ids holds 18, expected ids from 0 to 17": GOOD | {"completion_ids": [4, 18]},
    "line 2: prompt_ids holds -1": GOOD | {"prompt_ids": [-1]},
    "line 2: completion_ids is 'ab', expected a list of token ids": GOOD | {"completion_ids": "ab"},
    "line 2: score is 'high', expected a number or null": GOOD | {"score": "high"},
    "line 2: prompt_ids is empty": GOOD | {"prompt_ids": []},
    "line 2: action_mask is no list of true and false for each of 2": GOOD | {"action_mask": [True]},
    "line 2 has 71 tokens, expected at most 64": GOOD | {"completion_ids": [4] * 69},
    "line 2: completion_ids read 'cd', expected 'dc', its completion: they are another tokenizer's": GOOD
    | {"completion": "dc"},
    "line 2 is list, expected a row": [1],
}


@pytest.mark.parametrize("message", BAD)
def test_rows_that_cannot_be_used_are_named(tmp_path, message):
    path = write(tmp_path / "rollouts.jsonl", [GOOD, BAD[message]])
    with pytest.raises(ValueError, match=message):
        read_rollouts([path], make_tokenizer(), Limits(18, 64))


def test_rows_without_a_valid_score_are_passed_over_and_counted(recipe, tmp_path):
    rows = rows_of(30)
    rows[3]["score"], rows[4]["completion_ids"], rows[4]["completion"] = None, [], ""
    notes = []
    train_critic(recipe(epochs=1), [write(tmp_path / "rollouts.jsonl", rows)], tmp_path / "out", notes.append)
    assert "passed over 2 of 30 completions" in notes[0]
    path = write(tmp_path / "none.jsonl", [GOOD | {"score": None}])
    with pytest.raises(ValueError, match="hold no completion with a valid score"):
        read_rollouts([path], make_tokenizer(), Limits(18, 64))


def test_scores_beyond_a_histograms_range_are_said(recipe, tmp_path):
    notes, path = [], write(tmp_path / "rollouts.jsonl", rows_of(30))
    train_critic(recipe(epochs=1, head="two-hot", value_range=(0.0, 0.1)), [path], tmp_path / "out", notes.append)
    assert any("outside of critic.value_range" in note for note in notes)


def test_a_pretrained_critic_with_another_head_is_refused(recipe, make_trainer, tmp_path):
    path = write(tmp_path / "rollouts.jsonl", rows_of(30))
    done = train_critic(recipe(epochs=1, **HEADS["hl-gauss"]), [path], tmp_path / "out", note=lambda text: None)
    with pytest.raises(
        ValueError, match="critic.head is scalar, expected hl-gauss, with which the critic in .* was trained"
    ):
        make_trainer(critic__model=str(done.folder))
    with pytest.raises(ValueError, match="critic.bins is 21, expected 31"):
        make_trainer(
            critic__model=str(done.folder), critic__head="hl-gauss", critic__value_range=(-0.2, 1.2), critic__bins=21
        )


def test_only_a_critic_with_a_trunk_of_its_own_is_trained(recipe, tmp_path):
    for kind, settings in {"shared": recipe(epochs=None, kind="shared"), "none": recipe(epochs=None)}.items():
        if kind == "none":
            settings = Recipe(model=settings.model, advantage={"estimator": "remax"})
        with pytest.raises(ValueError, match=f"critic.kind is {kind}, expected separate"):
            train_critic(settings, [], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_on_the_command_line(base, make_trainer, tmp_path, capsys):
    """Beside the recipe's output_dir; the last line is the command that goes on."""
    recipe = tmp_path / "my recipe.yaml"
    recipe.write_text(f"output_dir: {tmp_path}/run\nmodel: {{name: {base}}}\ndevice: cpu\n")
    rollouts = write(tmp_path / "rollouts.jsonl", rows_of(40))
    arguments = [
        "critic",
        str(recipe),
        "critic.lr=1e-3",
        "learner.epochs=1",
        "--rollouts",
        rollouts,
        "--rollouts",
        rollouts,
    ]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "run-critic" / "model"
    goes_on = shlex.split(printed.split("go on with: ")[1])
    assert "80 completions" not in printed and goes_on == ["fastppo", "train", str(recipe), f"critic.model={folder}"]
    assert (folder / "value_head.safetensors").exists() and (folder / "config.json").exists()
    make_trainer(count_a, critic__model=str(folder), total_steps=1).train()
    assert cli.main(arguments) == 2 and "holds a run already" in capsys.readouterr().err
    assert cli.main(["critic", str(recipe), "--rollouts", "nowhere.jsonl", "-o", str(tmp_path / "x")]) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["critic", str(recipe)])
