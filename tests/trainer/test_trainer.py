"""The trainer as users call it: records, evaluation, bad rewards and bad arguments."""

from __future__ import annotations

import io
import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fastppo import PPOConfig, PPOTrainer, cli
from fastppo.console import Reporter
from fastppo.model import load_model
from fastppo.rewards.scores import Scores
from fastppo.rollout import FinishReason
from fastppo.run_folder import MARK, read_metrics
from fastppo.trainer import TrainingError
from tests.tiny import make_model, make_tokenizer
from tests.tiny_trainer import PROMPTS, count_a
from tests.tolerance import assert_rounds_to


@pytest.mark.usefixtures("curves")
def test_a_run_writes_its_records(make_trainer, tmp_path):
    trainer = make_trainer(
        eval_prompts=["ab", "cd"], total_steps=3, checkpoint__every=1, evaluation__every=2, reward__kl_coef=0.05
    )
    trainer.train()
    folder = tmp_path / "run"
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    expected = (
        "objective/scores objective/kl objective/entropy objective/rlhf_reward policy/approxkl_avg policy/clipfrac_avg"
    )
    expected += " policy/entropy_avg loss/policy_avg loss/value_avg val/clipfrac_avg val/explained_var val/ratio lr"
    expected += " completions/mean_length completions/clipped_ratio rewards/count_a/mean rewards/count_a/std"
    expected += " rollout/logprob_diff_mean rollout/logprob_diff_max grad_norm/policy grad_norm/critic time/rollout"
    expected += " time/reward time/update perf/tokens_per_second perf/max_memory_gb"
    assert set(expected.split()) <= set(rows[1])
    assert "eval/scores" in rows[0] and "eval/scores" in rows[2] and "eval/scores" not in rows[1]
    assert rows[1]["objective/kl"] == 0, "policy and reference are the same before the first update"
    uniform = torch.tensor(len(trainer.tokenizer)).log()  # what an untrained model's log-probabilities are about
    assert_rounds_to(uniform + rows[1]["rollout/logprob_diff_max"], uniform.double())
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 3 * trainer.config.num_logged_samples
    assert (folder / "config.yaml").exists() and (folder / "curve.png").exists()
    assert len(list(folder.glob("checkpoints/step-*"))) == 2, "checkpoint.keep"


def test_the_exported_model_loads_in_transformers(make_trainer, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer = make_trainer(total_steps=1)
    trainer.train()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert model.config._attn_implementation != "fastppo"
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name])


@pytest.mark.parametrize("breakage", ["curve.png is a folder", "a display", "matplotlib"])
@pytest.mark.usefixtures("curves")
def test_what_only_shows_may_fail(make_trainer, tmp_path, monkeypatch, breakage):
    trainer = make_trainer(total_steps=1)
    if breakage == "curve.png is a folder":
        (tmp_path / "run" / "curve.png").mkdir(parents=True)
        (tmp_path / "run" / "config.yaml").write_text(MARK)
    elif breakage == "a display":
        closed = io.StringIO()
        closed.close()
        trainer.reporter = Reporter(1, console=Console(file=closed, force_terminal=False))
    else:
        monkeypatch.setattr("fastppo.run_loop.plot_run", lambda folder: 1 / 0)
    assert trainer.train()
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_a_model_that_cannot_be_written_is_in_a_checkpoint(make_trainer, tmp_path, monkeypatch):
    """And `fastppo export` writes it once it can be."""
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    run, model = tmp_path / "a run", load_model(tmp_path / "base", dtype="auto", device="cpu")
    trainer = make_trainer(total_steps=1, model=model, output_dir=run)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.model, "save_pretrained", lambda path: 1 / 0)
        with pytest.raises(
            TrainingError, match="model could not be written.*`fastppo export .*run'` writes them"
        ) as said:
            trainer.train()
    program, *words = shlex.split(str(said.value).split("`")[1])
    assert program == "fastppo" and cli.main(words) == 0
    trainer.save_pretrained(tmp_path / "expected")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (run / "model" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes(), name


def test_a_model_is_never_written_to_nowhere(make_trainer, tmp_path):
    """Transformers passes over a file in its place without an error."""
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        make_trainer().save_pretrained(tmp_path / "file")


def test_reward_errors_are_shown_harmlessly(make_trainer):
    def hostile(prompts, completions, **_):
        raise ValueError("\x1b[2J\x1b]0;owned\x07")

    with pytest.raises(TrainingError, match="owned") as error:
        make_trainer(hostile).train()
    assert not re.search(r"[\x1b\x07]", str(error.value))


@pytest.mark.parametrize("as_given", [Path, str])
def test_a_model_may_be_a_path(make_trainer, tmp_path, as_given, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    config = PPOConfig(device="cpu", output_dir=as_given("~/run"), rollout={"max_new_tokens": 8})
    trainer = PPOTrainer(as_given("~/base"), reward=count_a, prompts=PROMPTS, config=config)
    assert config.output_dir == str(tmp_path / "run") and trainer.recipe["model"]["name"] == str(tmp_path / "base")


def test_same_seed_same_run(make_trainer, tmp_path):
    def run(name, **changes):
        trainer = make_trainer(output_dir=tmp_path / name, **changes)
        trainer.train()
        return trainer.model.state_dict()

    first, second, other = run("a"), run("b"), run("c", seed=1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_several_samples_and_columns(make_trainer):
    seen = {}

    def reward(prompts, completions, target, completion_ids, **_):
        seen.update(prompts=prompts, target=target, ids=completion_ids)
        return [float(t in c) for t, c in zip(target, completions, strict=True)]

    rows = [{"prompt": "ab", "target": "c"}, {"prompt": "de", "target": "f"}]
    make_trainer(
        reward, prompts=rows, rollout__prompts_per_step=2, rollout__samples_per_prompt=3, total_steps=1
    ).train()
    assert sorted(seen["prompts"]) == ["ab"] * 3 + ["de"] * 3
    assert all(
        target == {"ab": "c", "de": "f"}[prompt] for prompt, target in zip(seen["prompts"], seen["target"], strict=True)
    )
    assert all(isinstance(ids, list) for ids in seen["ids"])


def raising(prompts, completions, **_):
    raise KeyError("no such column")


def wrong_length(prompts, completions, **_):
    return [1.0]


def always_nan(prompts, completions, **_):
    return [math.nan] * len(completions)


def never_returning(prompts, completions, **_):
    while True:
        pass


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (raising, "no such column"),
        (wrong_length, "1"),
        (always_nan, "NaN"),
        (never_returning, "no answer within 0.5 s"),
    ],
)
def test_a_broken_reward_stops_the_run_and_says_why(make_trainer, tmp_path, reward, message):
    trainer = make_trainer(reward, reward__timeout=0.5 if reward is never_returning else 20.0, reward__retries=0)
    with pytest.raises(TrainingError, match=message):
        trainer.train()
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_invalid_samples_are_left_out_never_scored_zero(make_trainer):
    calls = []

    def sometimes(prompts, completions, **_):
        calls.append(completions)
        return [math.nan if i % 4 == 0 else 1.0 for i in range(len(completions))]

    metrics = make_trainer(sometimes, total_steps=1).train()
    assert metrics["objective/scores"] == 1.0
    assert metrics["rewards/sometimes/mean"] == 1.0


def test_samples_whose_logits_broke_are_left_out(make_trainer):
    """What was drawn before the logits became NaN is no ending that a reward should speak about."""
    trainer = make_trainer(reward__max_failure_rate=1.0)
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[5] = torch.nan  # whoever draws this letter has no next one
    rollout = trainer.engine.generate([[2, 3]] * 64, trainer.config.rollout.sampling(0))
    broken = rollout.finish_reasons == FinishReason.ERROR
    begun = torch.tensor(rollout.action_counts) > 0
    assert (broken & begun).any() and not broken.all(), "the case this test is about occurs"
    valid = trainer._valid(rollout, Scores(torch.ones(64), {}), errors=[])
    assert valid == (~broken).nonzero().squeeze(1).tolist()


def test_as_many_failures_as_may_be_are_not_more(make_trainer):
    """1 - 7/10 is above 0.3 in floating point."""
    trainer = make_trainer(reward__max_failure_rate=0.3)
    rollout = trainer.engine.generate([[2, 3]] * 10, trainer.config.rollout.sampling(0))
    values = torch.ones(10).index_fill(0, torch.arange(3), torch.nan)
    assert trainer._valid(rollout, Scores(values, {}), errors=[]) == list(range(3, 10))
    with pytest.raises(TrainingError, match="40% of the samples"):
        trainer._valid(rollout, Scores(values.index_fill(0, torch.tensor([9]), torch.nan), {}), errors=[])


def test_missing_eos_penalty_follows_the_finish_reason(make_trainer):
    """Not the length: an end-of-sequence as the last allowed token is an ending (trl#1536)."""
    trainer = make_trainer()
    rollout = trainer.engine.generate([[2, 3]] * 64, trainer.config.rollout.sampling(0))
    scores = Scores(torch.zeros(64), {}).penalised(rollout, 2.0).values
    assert torch.equal(scores == -2, rollout.finish_reasons == FinishReason.LENGTH)
    full = torch.tensor(rollout.action_counts) == trainer.config.rollout.max_new_tokens
    assert (full & (scores == 0)).any(), "the case this test is about occurs"


def test_learning_rate_zero_changes_nothing(make_trainer):
    trainer = make_trainer(optimizer__lr=0.0, critic__lr=0.0)
    before = {name: value.clone() for name, value in trainer.roles.state_dict().items()}
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.roles.state_dict().items())


def test_shared_trunk_trains(make_trainer):
    metrics = make_trainer(
        critic__kind="shared", reward__whiten=True, advantage__bootstrap_truncated=True, reward__missing_eos_penalty=0.5
    ).train()
    assert math.isfinite(metrics["loss/value_avg"])


@pytest.mark.parametrize("changes", [{}, {"loss__rollout_correction": "truncate"}])  # two records share a tensor
def test_training_stops_when_updates_stay_nan(make_trainer, tmp_path, changes):
    trainer = make_trainer(learner__max_skipped_updates=2, **changes)
    with torch.no_grad():
        trainer.roles.trained()["critic"].head.bias.fill_(torch.nan)
    with pytest.raises(TrainingError, match="not finite.*offending-batch"):
        trainer.train()
    (dumped,) = (tmp_path / "run").glob("offending-batch-*.safetensors")
    said = {"rollout.logprobs", "evaluation.logprobs", "evaluation.values", "targets.advantages"}
    assert said <= load_file(dumped).keys(), "neither record's hide the other's"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "prompts"),
        ({"prompts": [""]}, "prompt"),
        ({"prompts": ["a" * 60]}, "60"),
        ({"prompts": ["ab", 3]}, "prompts"),
        ({"reward": "count_a"}, "reward"),
        ({"device": "abacus"}, "device is 'abacus'"),
        ({"seed": 2**63}, "seed"),
        ({"rollout__stop_token_ids": [-1]}, "stop_token_ids"),
        ({"rollout__stop_token_ids": [18]}, r"stop_token_ids\[0\] is 18, expected less than the vocabulary size 18"),
        ({"rollout__max_new_tokens": 64}, "max_new_tokens is 64"),
        ({"eval_prompts": []}, "eval_prompts"),
    ],
)
def test_bad_arguments_name_themselves_and_write_nothing(make_trainer, tmp_path, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make_trainer(**changes)
    assert not (tmp_path / "run").exists()


def test_a_loaded_model_needs_its_tokenizer():
    with pytest.raises(ValueError, match="tokenizer is None"):
        PPOTrainer(make_model(), reward=count_a, prompts=PROMPTS, config=PPOConfig(device="cpu"))


@pytest.mark.parametrize(
    ("model", "message"), [(None, "^model is NoneType, expected a folder"), ("", "^model is empty, expected a folder")]
)
def test_a_call_without_a_model_is_told_so(model, message):
    with pytest.raises((ValueError, TypeError), match=message):
        PPOTrainer(model, reward=count_a, prompts=PROMPTS, config=PPOConfig(device="cpu"))


def test_an_unknown_model_name_is_an_error():
    with pytest.raises(ValueError, match="no-such-model"):
        PPOTrainer("./no-such-model", reward=count_a, prompts=PROMPTS, tokenizer=make_tokenizer())


def test_an_unsupported_architecture_is_refused():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=18, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="BloomForCausalLM"):
        PPOTrainer(model, reward=count_a, prompts=PROMPTS, tokenizer=make_tokenizer(), config=PPOConfig(device="cpu"))


def test_a_finished_run_is_not_overwritten(make_trainer):
    make_trainer(total_steps=1).train()
    with pytest.raises(ValueError, match="resume"):
        make_trainer(total_steps=1).train()
