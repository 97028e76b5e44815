"""Runs that train LoRA adapters: they learn, their base stays, and they are kept, resumed and written."""

from __future__ import annotations

import copy
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fastppo import cli
from fastppo.config import PPOConfig
from fastppo.errors import CheckpointError
from fastppo.export import export_run
from fastppo.model.lora import without_adapters
from fastppo.run_folder import read_metrics
from tests.tiny import make_model, make_tokenizer
from tests.trainer.test_learning import PROMPTS, SETTINGS, copies_of_first
from tests.trainer.test_resume import stable

peft = pytest.importorskip("peft")
LORA = {"lora__r": 4, "lora__alpha": 8, "reward__kl_coef": 0.05, "checkpoint__every": 1, "learner__epochs": 2}


def wrapped(seed: int = 3) -> peft.PeftModel:
    """With an adapter that has learned something."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(make_model(), config, adapter_name="chat")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def adapters_of(trainer) -> dict[str, Tensor]:
    return {
        f"{role}/{name}": x.clone()
        for role, own in trainer.roles.trained().items()
        for name, x in own.state_dict().items()
    }


def assert_base_is(model: PreTrainedModel, expected: PreTrainedModel) -> None:
    found = {without_adapters(name): x for name, x in model.named_parameters() if ".lora_" not in name}
    assert found.keys() == dict(expected.named_parameters()).keys()
    assert all(torch.equal(x, found[name]) for name, x in expected.named_parameters())


@pytest.mark.parametrize("critic", ["lora", "shared"])
def test_adapters_move_and_their_base_stays(make_trainer, tmp_path, critic):
    trainer = make_trainer(total_steps=2, critic__kind=critic, **LORA)
    before = adapters_of(trainer)
    trainer.train()
    assert_base_is(trainer.model, make_model())
    after = adapters_of(trainer)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000002"
    saved = {name for role in ("policy", "critic") for name in load_file(checkpoint / f"{role}.safetensors")}
    assert all(".lora_" in name or "weight" == name or "bias" == name or name.startswith("head.") for name in saved)
    rows = read_metrics(tmp_path / "run")
    assert rows[0]["objective/kl"] == 0 and rows[1]["objective/kl"] != 0, "the reference is the policy of the start"


def test_the_model_folder_is_merged_and_the_adapter_stands_beside_it(make_trainer, tmp_path):
    trainer = make_trainer(total_steps=1, **LORA)
    trainer.train()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    expected = trainer.roles.adapters.merged_state()
    assert merged.state_dict().keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in merged.state_dict().items())
    beside = peft.PeftModel.from_pretrained(make_model(), tmp_path / "run" / "adapter")
    found = {name.replace(".default", ""): x for name, x in beside.get_base_model().named_parameters()}
    for name, x in trainer.roles.trained()["policy"].state_dict().items():
        assert torch.equal(found[name], x)


def test_the_best_step_is_written_merged(make_trainer, tmp_path):
    """That of the start, where the adapter changes nothing yet; the trainer's own adapter stays the newest."""
    changes = {
        "total_steps": 1,
        "eval_prompts": ["ab"],
        "evaluation__metric": "eval/own",
        "evaluation__keep_best": True,
    }
    trainer = make_trainer(**LORA | changes)
    trainer.evaluate = lambda: {"eval/own": -float(trainer.step)}
    trainer.train()
    best, newest = (load_file(tmp_path / "run" / name / "model.safetensors") for name in ("best", "model"))
    expected = trainer.roles.adapters.merged_state()
    assert all(torch.equal(x, newest[name]) for name, x in expected.items() if name in newest)
    assert all(torch.equal(x, best[name]) for name, x in make_model().state_dict().items() if name in best)
    assert any(not torch.equal(x, newest[name]) for name, x in best.items())
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    exported = export_run(tmp_path / "run", tmp_path / "exported", best=True, model=tmp_path / "base")
    assert all(torch.equal(x, best[name]) for name, x in load_file(exported / "model.safetensors").items())


@pytest.mark.parametrize("make", [make_model, wrapped])
def test_a_resumed_run_goes_on_bitwise(make_trainer, tmp_path, make):
    settings = LORA | ({} if make is make_model else {"lora__r": 0, "critic__kind": "lora"})
    whole = make_trainer(model=make(), output_dir=tmp_path / "whole", total_steps=3, **settings)
    whole.train()
    make_trainer(model=make(), total_steps=2, **settings).train()
    resumed = make_trainer(model=make(), total_steps=3, **settings)
    resumed.train(resume=True)
    expected, found = adapters_of(whole), adapters_of(resumed)
    assert expected.keys() == found.keys() and all(torch.equal(found[name], x) for name, x in expected.items())
    rows = [list(map(stable, read_metrics(tmp_path / name))) for name in ("whole", "run")]
    assert rows[0] == rows[1]


CHANGED = {
    "its adapters are of another base model": {"model": 5},
    "lora.r is 2, was 4": {"lora__r": 2},
    "lora.target_modules is ['q_proj'], was ": {"lora__target_modules": "q_proj"},
    "lora is None, was {": {"lora__r": 0, "critic__kind": "shared"},
}


@pytest.mark.parametrize("message", CHANGED)
def test_another_base_or_adapter_is_refused_by_name(make_trainer, message):
    make_trainer(total_steps=1, **LORA).train()
    changes = dict(CHANGED[message])
    model = make_model(seed=changes.pop("model", 0))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        make_trainer(model=model, total_steps=2, **LORA | changes).train(resume=True)


def test_another_start_of_the_users_adapter_is_refused(make_trainer):
    settings = LORA | {"lora__r": 0, "critic__kind": "lora"}
    make_trainer(model=wrapped(), total_steps=1, **settings).train()
    with pytest.raises(CheckpointError, match="another reference"):
        make_trainer(model=wrapped(seed=4), total_steps=2, **settings).train(resume=True)


def test_a_peft_model_trains_in_place_under_its_own_name(make_trainer, tmp_path):
    model = wrapped()
    before = copy.deepcopy(model.state_dict())
    trainer = make_trainer(model=model, total_steps=1, critic__kind="lora", reward__kl_coef=0.05)
    trainer.train()
    assert model.active_adapters == ["chat"] and read_metrics(tmp_path / "run")[0]["objective/kl"] == 0
    moved = {name for name, x in model.state_dict().items() if name in before and not torch.equal(x, before[name])}
    assert moved == {name for name in before if ".chat." in name}


def test_a_critic_of_its_own_is_refused_beside_adapters(make_trainer):
    with pytest.raises(ValueError, match=r"critic.kind is separate, expected lora, shared or none"):
        make_trainer(model=wrapped())
    with pytest.raises(ValueError, match=r"critic.kind is lora, expected another kind"):
        make_trainer(critic__kind="lora")
    with pytest.raises(ValueError, match=r"critic.kind is separate, expected lora or shared with .* and lora.r 4"):
        PPOConfig(lora={"r": 4}, critic={"kind": "separate"})
    assert PPOConfig(lora={"r": 4}).critic.kind == "lora"
    assert (
        PPOConfig(lora={"r": 4}, advantage={"estimator": "rloo"}, rollout={"samples_per_prompt": 2}).critic.kind
        == "none"
    )


def test_trpo_moves_the_policys_adapter(make_trainer, tmp_path):
    trainer = make_trainer(algorithm="trpo", total_steps=2, rollout__samples_per_prompt=4, lora__r=4, lora__alpha=8)
    trainer.train()
    assert_base_is(trainer.model, make_model())
    rows = read_metrics(tmp_path / "run")
    assert all(0 < row["policy/kl"] <= 0.01 for row in rows)


@pytest.fixture
def base(tmp_path) -> Path:
    """A model's folder."""
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_export_merges_a_checkpoint_or_writes_its_adapter(make_trainer, tmp_path, base, capsys):
    run = tmp_path / "run"
    trainer = make_trainer(model=AutoModelForCausalLM.from_pretrained(base), total_steps=2, **LORA)
    trainer.train()
    assert cli.main(["export", str(run), str(tmp_path / "merged")]) == 0
    merged, final = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", run / "model"))
    assert merged.keys() == final.keys() and all(torch.equal(merged[name], x) for name, x in final.items())
    assert cli.main(["export", "--adapter", "--step", "2", str(run)]) == 0
    exported, final = (
        load_file(run / name / "adapter_model.safetensors") for name in ("adapter-step-000002", "adapter")
    )
    assert exported.keys() == final.keys() and all(torch.equal(exported[name], x) for name, x in final.items())
    make_model(seed=7).save_pretrained(base)
    with pytest.raises(CheckpointError, match="holds an adapter of another model"):
        export_run(run, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_export_knows_a_users_adapter_by_its_settings(make_trainer, tmp_path, base):
    """Whatever it is called."""
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(r=2, target_modules=["v_proj"]), adapter_name="chat"
    )
    make_trainer(model=model, total_steps=1, critic__kind="shared").train()
    export_run(tmp_path / "run", tmp_path / "merged")
    merged, final = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "run/model"))
    assert all(torch.equal(merged[name], x) for name, x in final.items())


def test_export_refuses_an_adapter_where_there_is_none(make_trainer, tmp_path):
    make_trainer(total_steps=1).train()
    with pytest.raises(ValueError, match="adapter is True, expected False"):
        export_run(tmp_path / "run", adapter=True)


def test_export_asks_for_the_model_that_damaged_settings_do_not_name(make_trainer, tmp_path):
    make_trainer(total_steps=1).train()
    (tmp_path / "run" / "config.yaml").write_text("# Settings of a fastppo run\nmodel: 3\n")
    with pytest.raises(ValueError, match="does not say which model it started from: name it"):
        export_run(tmp_path / "run", tmp_path / "exported")


def learn(make_trainer, lr: float, seed: int = 0, deal=lambda scores: scores) -> tuple[float, float]:
    """Score of the first step, and the mean of the last three. The head, which no adapter is on, is large enough to say anything at all.

    deal: which sample gets which of a step's scores for its reward.
    """
    model, scores = make_model(), []
    model.lm_head.weight.data.mul_(15)

    def reward(prompts, completions, **_):
        found = copies_of_first(prompts, completions)
        scores.append(sum(found) / len(found))
        return deal(found)

    changes = {"lora__r": 4, "lora__alpha": 16, "optimizer__lr": lr, "critic__lr": lr, "seed": seed}
    trainer = make_trainer(reward, model=model, prompts=PROMPTS, reward__kl_coef=0.001, **SETTINGS | changes)
    trainer.train()
    return scores[0], sum(scores[-3:]) / 3


@pytest.mark.slow
def test_adapters_on_one_trunk_learn(make_trainer, tmp_path):
    first, last = learn(make_trainer, 1e-2)
    assert first < 0.2 and last > 0.85
    variances = [row["val/explained_var"] for row in read_metrics(tmp_path / "run") if "val/explained_var" in row]
    assert max(variances[5:]) > 0.15, "the critic learns too"


@pytest.mark.slow
def test_nothing_is_learned_at_learning_rate_zero(make_trainer):
    first, last = learn(make_trainer, 0.0)
    assert first < 0.2 and last < 0.2


@pytest.mark.slow
def test_adapters_learn_nothing_from_shuffled_rewards(make_trainer):
    draw = random.Random(0)
    first, last = learn(make_trainer, 1e-2, deal=lambda scores: draw.sample(scores, len(scores)))
    assert first < 0.2 and last < 0.3
