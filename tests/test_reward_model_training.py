"""`fastppo reward-model`: it learns the preference, says what is wrong with data and settings, and writes a model that PPO can ask."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch

from fastppo import cli
from fastppo.recipe import load_recipe
from fastppo.reward_model_config import RewardModelRecipe
from fastppo.reward_model_training import train_reward_model
from fastppo.rewards import RewardModel
from tests.tiny import make_model, make_tokenizer

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "reward_model.yaml"
LENGTH = 6


def preferences(count, seed, label=lambda draw: True):
    """Pairs of which the one with more of the letter a is chosen, where `label` says so, else the other."""
    draw, rows = random.Random(seed), []
    while len(rows) < count:
        answers = ["".join(draw.choice("aabcdefg") for _ in range(LENGTH)) for _ in range(2)]
        worse, better = sorted(answers, key=lambda text: text.count("a"))
        if better.count("a") > worse.count("a"):
            chosen, rejected = (better, worse) if label(draw) else (worse, better)
            rows.append({"prompt": draw.choice("bcd"), "chosen": chosen, "rejected": rejected})
    return rows


@pytest.fixture
def base(tmp_path):
    """Folder of a language model with its tokenizer."""
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def train(base, tmp_path):
    """train(rows, held_out=rows, **settings of `training`) -> (metrics, notes)"""

    def act(rows, held_out=None, model=base, **training):
        data = {"eval_size": 100}
        for name, content in (("path", rows), ("eval_path", held_out)):
            if content is not None:
                data[name] = str(tmp_path / f"{name}.jsonl")
                Path(data[name]).write_text("".join(json.dumps(row) + "\n" for row in content))
        settings = {"model": {"name": model}, "data": data, "output_dir": str(tmp_path / "rm"), "device": "cpu"}
        defaults = {"epochs": 5, "lr": 3e-3, "batch_size": 32, "microbatch_size": 16, "max_length": 32}
        notes: list[str] = []
        metrics = train_reward_model(RewardModelRecipe(**settings, training=defaults | training), notes.append)
        return metrics, notes

    return act


needs_trl = pytest.mark.skipif("not __import__('importlib.util').util.find_spec('trl')", reason="TRL is not installed")


@needs_trl
def test_it_learns_and_writes_what_it_learned(train, tmp_path):
    rows = preferences(500, seed=0)
    metrics, notes = train(rows)
    assert metrics["accuracy"] > 0.9 and metrics["loss"] < 0.3 and metrics["mean_margin"] > 1
    assert (metrics["train_pairs"], metrics["held_out_pairs"]) == (400, 100)
    assert notes[0].startswith("step 1 of 65: loss 0.") and "step 60 of 65" in notes[-1]
    folder = tmp_path / "rm"
    written = {path.name for path in folder.iterdir()} - {".lock", "history.jsonl"}
    assert written == {"config.yaml", "model", "metrics.json", "calibration.png", "checkpoints"}
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert load_recipe(folder / "config.yaml", (), RewardModelRecipe).training.lr == 3e-3
    written = RewardModel(folder / "model", device="cpu")
    held_out, prompts = rows[-100:], [row["prompt"] for row in rows[-100:]]
    chosen, rejected = (torch.tensor(written(prompts, [row[n] for row in held_out])) for n in ("chosen", "rejected"))
    assert (chosen > rejected).float().mean().item() == pytest.approx(metrics["accuracy"])


@needs_trl
def test_nothing_is_learned_from_shuffled_labels(train):
    metrics, notes = train(preferences(500, seed=0, label=lambda draw: draw.random() < 0.5))
    assert 0.35 < metrics["accuracy"] < 0.65, "within three standard errors of one half"
    assert not any("swapped" in note for note in notes)


@needs_trl
def test_swapped_pairs_are_said(train):
    swapped = preferences(100, seed=1, label=lambda draw: False)
    metrics, notes = train(preferences(400, seed=0), held_out=swapped)
    assert metrics["accuracy"] < 0.1 and "is far below one half: chosen and rejected look swapped" in notes[-1]


@needs_trl
@pytest.mark.parametrize(("margin", "center_coef"), [(None, 0.0), (0.7, 0.0), (None, 2.0), (0.7, 2.0)])
def test_the_loss_is_the_formula(train, tmp_path, margin, center_coef):
    """That of the only step, which learning rate 0 leaves without effect, from the written model's scores."""
    rows = [row | ({"margin": margin} if margin else {}) for row in preferences(32, seed=0)]
    settings = {"epochs": 1, "lr": 0.0, "batch_size": 32, "microbatch_size": 32, "center_coef": center_coef}
    _, notes = train(rows, held_out=preferences(100, seed=1), **settings)
    written, prompts = RewardModel(tmp_path / "rm" / "model", device="cpu"), [row["prompt"] for row in rows]
    chosen, rejected = (torch.tensor(written(prompts, [row[n] for row in rows])) for n in ("chosen", "rejected"))
    likelihood = torch.nn.functional.logsigmoid(chosen - rejected - (margin or 0.0))
    loss = (center_coef * (chosen + rejected) ** 2 - likelihood).mean()
    assert notes[0].startswith(f"step 1 of 1: loss {loss:.3f}, ")


@needs_trl
def test_it_goes_on_with_a_reward_model(train, tmp_path):
    rows = preferences(300, seed=0)
    first, _ = train(rows)
    (tmp_path / "rm").rename(tmp_path / "first")
    same, _ = train(rows, model=tmp_path / "first" / "model", lr=0.0, epochs=1)
    assert same == first


@needs_trl
def test_nothing_is_written_over_another_folder_or_after_a_failure(train, tmp_path):
    (tmp_path / "rm").mkdir()
    (tmp_path / "rm" / "notes.txt").touch()
    with pytest.raises(ValueError, match="output_dir .* holds other files"):
        train(preferences(200, seed=0))
    (tmp_path / "rm" / "notes.txt").unlink()
    with pytest.raises(ValueError, match="row 0 has no 'chosen'"):
        train([{"prompt": "a", "rejected": "b"}] * 200)
    assert list((tmp_path / "rm").iterdir()) == []


@needs_trl
def test_models_that_cannot_be_trained(train, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    make_model().save_pretrained(tmp_path / "no-pad")
    tokenizer.save_pretrained(tmp_path / "no-pad")
    with pytest.raises(ValueError, match="neither a pad token nor an end of sequence"):
        train(preferences(200, seed=0), model=tmp_path / "no-pad")
    with pytest.raises(ValueError, match=r"model.name is empty"):
        train(preferences(200, seed=0), model="")


@needs_trl
def test_a_language_model_that_lacks_weights_is_refused(train, base, tmp_path):
    model = make_model()
    state = {name: value for name, value in model.state_dict().items() if "layers.1" not in name}
    model.save_pretrained(base, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks weights, .*model.layers.1"):
        train(preferences(200, seed=0))


@needs_trl
def test_the_command(stories_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [f"model.name={stories_model}", "training.lr=1e-3", "epochs=1", "device=cpu"]
    assert cli.main(["reward-model", str(RECIPE), *arguments]) == 0
    assert "held-out pairs, mean margin" in capsys.readouterr().out.splitlines()[-1]
    metrics = json.loads(Path("runs/reward_model/metrics.json").read_text())
    assert metrics["held_out_pairs"] == 60 and metrics["accuracy"] > 0.7


def test_the_recipe_needs_nothing_outside_the_repository_but_the_hub():
    recipe = load_recipe(RECIPE, (), RewardModelRecipe)
    assert Path(recipe.data.path).is_relative_to(RECIPE.parent) and Path(recipe.data.path).exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.lrr=1", "key training.lrr is not known; the nearest is lr"),
        ("optimizer.lr=1", "section optimizer is not known; the nearest is"),
        ("max_len=8", "key max_len is not known; the nearest is training.max_length"),
        ("lr=yes", "training.lr is True: expected no true or false"),
        ("device=tpu", "device is 'tpu': expected 'auto', 'cpu' or 'cuda'"),
        ("batch_size=12", "training.batch_size is 12, expected a multiple of microbatch_size = 8"),
        ("data.eval_size=0", "data.eval_size is 0"),
    ],
)
def test_wrong_settings_are_one_line(override, message, capsys):
    assert cli.main(["reward-model", str(RECIPE), override]) == 2
    assert message in capsys.readouterr().err


def test_without_trl_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trl", None)
    assert cli.main(["reward-model", str(RECIPE)]) == 2
    assert "pip install fastppo[reward-model]" in capsys.readouterr().err


def test_the_recipe_of_ppo_reads_what_it_writes():
    ppo = load_recipe(RECIPE.with_name("rlhf.yaml"))
    (reward,) = ppo.reward.functions
    assert reward.arguments == {"model": f"{load_recipe(RECIPE, (), RewardModelRecipe).output_dir}/model"}
