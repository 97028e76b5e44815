"""`fastppo generate --search`, with the critic of a run."""

from __future__ import annotations

import pytest
import torch

from fastppo import cli
from fastppo.errors import CheckpointError
from fastppo.model import load_model, prepare_model
from fastppo.search import critic_values, load_critic
from tests.tiny import make_model
from tests.tiny_trainer import build_trainer
from tests.tolerance import assert_rounds_to


@pytest.fixture(scope="module", params=["shared", "separate"])
def trainer(request, tmp_path_factory):
    """After a step, with a run folder."""
    trainer = build_trainer(tmp_path_factory.mktemp("run") / request.param, critic__kind=request.param, total_steps=1)
    trainer.train()
    return trainer


def load(path):
    return load_model(path, dtype="float32", device="cpu")


def generate(trainer, *arguments):
    run = trainer.config.output_dir
    return cli.main(["generate", f"{run}/model", "--prompt", "ab", "--max-new-tokens", "6", *arguments])


def test_the_critic_of_a_run_is_the_trainers(trainer):
    run, states = trainer.config.output_dir, [[2, 3], [4], [2, 3, 4]]
    model = prepare_model(load(f"{run}/model"))
    said = critic_values(load_critic(run, model))(states)
    assert said == critic_values(trainer.roles)(states) and len(set(said)) == 3


HISTOGRAM = {"critic__head": "two-hot", "critic__bins": 11, "critic__value_range": [-1, 2]}
OTHER_CRITICS = {
    "histogram": {"critic__kind": "separate"} | HISTOGRAM,
    "histogram on the policy's trunk": {"critic__kind": "shared"} | HISTOGRAM,
    "adapter": {"critic__kind": "lora", "lora__r": 4},
    "histogram on an adapter": {"critic__kind": "lora", "lora__r": 4} | HISTOGRAM,
    "head on the policy's adapter": {"critic__kind": "shared", "lora__r": 4},
}


@pytest.mark.parametrize("kind", OTHER_CRITICS)
def test_histograms_and_adapters_are_the_trainers_too(tmp_path, capsys, kind):
    settings, base = OTHER_CRITICS[kind], tmp_path / "base"
    if "lora__r" in settings:
        pytest.importorskip("peft")
    make_model().save_pretrained(base)
    trainer = build_trainer(tmp_path / "run", model=load(base), **settings)
    trainer.train()
    model = prepare_model(load(tmp_path / "run" / "model"))
    states = [[2, 3], [4], [2, 3, 4]]
    said, expected = critic_values(load_critic(tmp_path / "run", model))(states), critic_values(trainer.roles)(states)
    assert_rounds_to(torch.tensor(said), torch.tensor(expected).double())
    assert len(set(said)) == 3
    arguments = ["--search", "value-guided", "--width", "3", "--critic", str(tmp_path / "run")]
    assert generate(trainer, *arguments) == 0, capsys.readouterr().err


def test_the_model_under_an_adapter_is_looked_at(tmp_path):
    pytest.importorskip("peft")
    make_model().save_pretrained(tmp_path / "base")
    for name, model in (("run", load(tmp_path / "base")), ("nameless", make_model())):
        build_trainer(tmp_path / name, model=model, lora__r=4, total_steps=1).train()
    make_model(seed=1).save_pretrained(tmp_path / "base")
    model = prepare_model(load(tmp_path / "run" / "model"))
    with pytest.raises(CheckpointError, match="holds an adapter of another model than"):
        load_critic(tmp_path / "run", model)
    with pytest.raises(ValueError, match="does not say which model it started from"):
        load_critic(tmp_path / "nameless", model)


def test_a_critic_of_another_model_is_refused(trainer, tmp_path):
    run = trainer.config.output_dir
    with pytest.raises(CheckpointError, match="another model|its own policy"):
        load_critic(run, prepare_model(make_model(hidden_size=16)))
    with pytest.raises(ValueError, match="has no checkpoints"):
        load_critic(tmp_path, trainer.model)
    none = build_trainer(tmp_path / "none", critic__kind="none", advantage__estimator="rloo", total_steps=1,
                         rollout__samples_per_prompt=2)  # fmt: skip
    none.train()
    with pytest.raises(ValueError, match="has no critic"):
        load_critic(tmp_path / "none", trainer.model)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--search", "value-guided", "--width", "3", "--budget", "18"),
        (
            "--search",
            "puct",
            "--step",
            "b",
            "--step-tokens",
            "3",
            "--simulations",
            "4",
            "--width",
            "2",
            "--c-puct",
            "0.5",
        ),
        ("--search", "best-of-n", "-n", "3"),
    ],
    ids=lambda arguments: arguments[1],
)
def test_an_answer_is_searched(trainer, capsys, arguments):
    assert generate(trainer, *arguments, "--critic", trainer.config.output_dir) == 0
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1 and f"{arguments[1]}: score " in printed.err and " tokens" in printed.err
    assert generate(trainer, "--prompt", "c", *arguments, "--critic", trainer.config.output_dir) == 0
    assert capsys.readouterr().out.startswith("--- prompt 0\n")


def test_most_votes_win(trainer, capsys):
    assert generate(trainer, "--search", "majority", "-n", "9", "--answer", "([a-h]|[i-p])") == 0
    assert "majority: score " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--width", "3"), "--width is given without --search"),
        (("--search", "puct"), "--search puct needs --critic"),
        (("--search", "majority", "-n", "3"), "--search majority needs --answer"),
        (("--search", "majority", "--answer", "a"), "-n is 1, expected 2 or more"),
        (("--search", "majority", "-n", "3", "--answer", "("), "--answer is '('"),
        (("--search", "best-of-n", "-n", "3", "--critic", "RUN", "--step", "b"), "does not take --step"),
        (("--search", "puct", "--critic", "nowhere"), "nowhere has no checkpoints"),
        (("--search", "puct", "--critic", "RUN", "--simulations", "0"), "simulations is 0"),
        (("--search", "puct", "--critic", "RUN", "--temperature", "0"), "temperature is 0"),
        (("--search", "value-guided", "--critic", "RUN", "-n", "2"), "sampling.n is 2"),
    ],
)
def test_mistakes_are_named(trainer, capsys, arguments, message):
    arguments = [trainer.config.output_dir if text == "RUN" else text for text in arguments]
    assert generate(trainer, *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("majority", "-n", "3", "--answer", "("), "--answer is '('"),
        (("puct", "--critic", "nowhere", "--simulations", "0"), "simulations is 0"),
        (("puct", "--critic", "nowhere", "--c-puct", "nan"), "c_puct is nan"),
    ],
)
def test_what_is_no_pattern_or_number_is_found_before_a_model_is_loaded(capsys, arguments, message):
    """There is none here."""
    assert cli.main(["generate", "./no-model", "--prompt", "a", "--search", *arguments]) == 2
    assert message in capsys.readouterr().err
