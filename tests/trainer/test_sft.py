"""Supervised fine-tuning: the gradient is that of plain cross-entropy, it learns and only by learning, and it goes on bit for bit."""

from __future__ import annotations

import copy
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from fastppo import Callback, Engine, PPOTrainer, SamplingParams, SFTConfig, SFTTrainer
from fastppo.checkpoint import list_checkpoints
from fastppo.console import Reporter
from fastppo.errors import CheckpointError, TrainingError
from fastppo.held_out import ONLY
from fastppo.learner import accumulate_gradients
from fastppo.run_folder import read_metrics
from tests.tiny import LETTERS, make_model, make_tokenizer
from tests.tiny_trainer import count_a, tiny_config
from tests.tolerance import assert_as_exact_as_model
from tests.trainer.test_callbacks import StopAt
from tests.trainer.test_resume import stable

# The second letter, as many times as the first one says.
COUNTS = {"a": 1, "b": 2, "c": 3, "d": 4}
ROWS = [{"prompt": a + b, "completion": b * count} for a, count in COUNTS.items() for b in LETTERS]
UNEVEN = [{"prompt": "ab" * (n % 3 + 1), "completion": "cd" * (n % 5) + "e"} for n in range(11)]


@pytest.fixture
def make(tmp_path):
    """make(rows, model=..., output_dir=..., eval_examples=..., callbacks=..., **settings by section)"""

    def act(rows=ROWS, *, model=None, output_dir=tmp_path / "run", eval_examples=None, callbacks=(), **settings):
        defaults = {"minibatch_size": 16}
        learner = defaults | settings.pop("learner", {})
        config = SFTConfig(output_dir=output_dir, device="cpu", learner=learner, **settings)
        return SFTTrainer(
            make_model() if model is None else model,
            examples=rows,
            eval_examples=eval_examples,
            callbacks=callbacks,
            config=config,
            tokenizer=make_tokenizer(),
            reporter=Reporter(0, quiet=True),
        )

    return act


# The loss


def plain_gradients(trainer, model, loss_tokens):
    """Of Transformers' own forward, an example at a time, and PyTorch's cross-entropy over all of them."""
    logits, labels = [], []
    for example in trainer.examples:
        tokens = torch.tensor(list(example.tokens))
        logits.append(model(tokens[None]).logits[0, :-1])
        kept = torch.zeros(len(tokens), dtype=torch.bool)
        kept[list(example.targets)] = True
        labels.append(torch.where(kept | torch.tensor(loss_tokens == "all"), tokens, -100)[1:])
    F.cross_entropy(torch.cat(logits), torch.cat(labels)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("loss_tokens", ["completion", "all"])
def test_the_gradient_is_that_of_plain_cross_entropy_whatever_the_split(make, loss_tokens):
    native_model = make_model()
    for budget in (8192, 40, 1):
        trainer = make(UNEVEN, learner={"loss_tokens": loss_tokens, "tokens_per_microbatch": budget})
        minibatch = trainer._microbatches(trainer.examples, range(len(UNEVEN)))
        assert len(minibatch) == {8192: 1, 40: 3, 1: 11}[budget]
        totals = accumulate_gradients(trainer._losses(trainer.learner.roles, minibatch))
        exact_model = copy.deepcopy(native_model).double()
        exact = plain_gradients(trainer, exact_model, loss_tokens)
        native = plain_gradients(trainer, copy.deepcopy(native_model), loss_tokens)
        for name, parameter in trainer.model.named_parameters():
            assert_as_exact_as_model(parameter.grad, native[name], exact[name], name)
        assert totals["loss/nll"].item() == pytest.approx(trainer_nll(trainer, loss_tokens))


def trainer_nll(trainer, loss_tokens):
    trainer.held_out = {ONLY: trainer.examples}
    return trainer.evaluate()["eval/nll"]


def test_an_epoch_sees_every_example_once(make):
    trainer = make(UNEVEN, learner={"minibatch_size": 4, "epochs": 2})
    seen = []
    microbatches = trainer._microbatches

    def recording(examples, indices):
        seen.append(list(indices))
        return microbatches(examples, indices)

    trainer._microbatches = recording
    trainer.train()
    assert [len(indices) for indices in seen] == [4, 4, 3] * 2 and trainer.total_steps == 6
    first, second = sum(seen[:3], []), sum(seen[3:], [])
    assert sorted(first) == sorted(second) == list(range(11)) and first != second


# Learning

LEARNING = {"learner": {"epochs": 40}, "optimizer": {"lr": 1e-2, "warmup_steps": 10}}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_learns_to_answer_and_to_stop(make, tmp_path, seed):
    """From chance (log 18 = 2.9 nats a token); what is written is what PPO begins with, by its name."""
    make(eval_examples=ROWS, seed=seed, model=make_model(seed), **LEARNING).train()
    rows = read_metrics(tmp_path / "run")
    assert rows[0]["eval/nll"] > 2.5 and rows[-1]["eval/nll"] < 0.2
    assert rows[-1]["eval/perplexity"] == pytest.approx(torch.tensor(rows[-1]["eval/nll"]).exp().item())
    trainer = PPOTrainer(
        tmp_path / "run" / "model", reward=count_a, prompts=["ab"], config=tiny_config(tmp_path / "ppo")
    )
    prompts = [trainer.tokenizer(row["prompt"])["input_ids"] for row in ROWS]
    rollout = trainer.engine.generate(prompts, SamplingParams(temperature=0.0, max_new_tokens=8))
    said = trainer.tokenizer.batch_decode(rollout.completions())
    right = [text == row["completion"] + "<eos>" for text, row in zip(said, ROWS, strict=True)]
    assert sum(right) > 0.9 * len(right)


def test_nothing_is_learned_at_learning_rate_zero(make, tmp_path):
    trainer = make(eval_examples=ROWS, **(LEARNING | {"optimizer": {"lr": 0.0}}))
    trainer.train()
    first, *_, last = read_metrics(tmp_path / "run")
    assert last["eval/nll"] == first["eval/nll"] > 2.5
    fresh = make_model().state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in trainer.model.state_dict().items())


def test_the_prompt_is_learned_too_where_all_tokens_count(make, tmp_path):
    """All prompts begin alike: nothing but their own loss can teach that."""
    rows = [{"prompt": f"po{row['prompt']}", "completion": row["completion"]} for row in ROWS]
    likelihoods = []
    for loss_tokens in ("completion", "all"):
        settings = LEARNING | {"learner": {"epochs": 20, "loss_tokens": loss_tokens}}
        trainer = make(rows, output_dir=tmp_path / loss_tokens, **settings)
        trainer.train()
        trainer.model.set_attn_implementation("sdpa")
        tokens = torch.tensor(trainer.tokenizer("po")["input_ids"])
        likelihoods.append(trainer.model(tokens[None]).logits[0, 0].log_softmax(-1)[tokens[1]].item())
    assert likelihoods[0] < -1 and likelihoods[1] > -0.1


# Records, resuming

SHORT = {"learner": {"epochs": 2}, "optimizer": {"lr": 1e-3}, "evaluation": {"every": 3}, "checkpoint": {"every": 2}}


def rows_of(folder):
    return [stable(row) for row in read_metrics(folder)]


def assert_same_run(trainer, folder, expected, expected_folder):
    assert rows_of(folder) == rows_of(expected_folder)
    weights = expected.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in trainer.model.state_dict().items())


@pytest.fixture
def uninterrupted(make, tmp_path):
    trainer = make(output_dir=tmp_path / "whole", eval_examples=ROWS[:8], **SHORT)
    trainer.train()
    return trainer


def at_update(trainer, nth, act):
    """`act` in the nth optimizer step."""
    step, calls = trainer.learner.optimizers["policy"].step, [0]

    def acting(norm):
        calls[0] += 1
        if calls[0] == nth:
            act()
        step(norm)

    trainer.learner.optimizers["policy"].step = acting


@pytest.mark.parametrize("nth", [1, 4, 5])
def test_an_interrupted_run_goes_on_bitwise(make, tmp_path, uninterrupted, nth):
    """Ctrl-C lets the update end and saves it."""
    trainer = make(eval_examples=ROWS[:8], **SHORT)
    at_update(trainer, nth, lambda: os.kill(os.getpid(), signal.SIGINT))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert trainer.step == nth
    trainer = make(eval_examples=ROWS[:8], **SHORT)
    trainer.train(resume=True)
    assert_same_run(trainer, tmp_path / "run", uninterrupted, tmp_path / "whole")


def test_a_run_that_breaks_off_within_an_update_goes_on_from_its_checkpoint(make, tmp_path, uninterrupted):
    trainer = make(eval_examples=ROWS[:8], **SHORT)
    at_update(trainer, 6, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    trainer = make(eval_examples=ROWS[:8], **SHORT)
    trainer.train(resume=True)
    assert_same_run(trainer, tmp_path / "run", uninterrupted, tmp_path / "whole")


def test_a_run_can_be_lengthened_and_says_what_is_not_as_before(make, tmp_path):
    make(**SHORT).train()
    trainer, notes = make(ROWS[:-1] + [{"prompt": "a", "completion": "b"}], **SHORT | {"learner": {"epochs": 3}}), []
    trainer.reporter.note = notes.append
    assert trainer.train(resume=True)["epoch"] == 3.0
    assert "learner.epochs 2 -> 3" in notes[0] and "other examples" in notes[0]
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(1, 13))


OTHERS = {
    "learner.minibatch_size is 8, was 16": {"learner": {"minibatch_size": 8}},
    "seed is 1, was 0": {"seed": 1},
    "number of examples is 63, was 64": {"rows": ROWS[1:]},
}


@pytest.mark.parametrize("message", OTHERS)
def test_what_may_not_change_is_refused_by_name(make, message):
    make(**SHORT).train()
    with pytest.raises(CheckpointError, match=message):
        make(**(SHORT | OTHERS[message])).train(resume=True)


def test_updates_that_are_not_finite_end_the_run_and_name_the_rows(make):
    trainer = make(UNEVEN, learner={"minibatch_size": 2, "max_skipped_updates": 2, "epochs": 4})
    torch.nn.init.constant_(trainer.model.lm_head.weight, float("nan"))
    with pytest.raises(
        TrainingError, match=r"2 updates in a row were not finite, .* rows \d+, \d+: lower optimizer.lr"
    ):
        trainer.train()


def test_the_written_model_is_the_trained_one(make, tmp_path):
    trainer = make(**SHORT)
    trainer.train()
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    assert all(torch.equal(value, written[name]) for name, value in trainer.model.state_dict().items())


def test_gradient_checkpointing_changes_no_more_than_roundings(make):
    trainers = [make(UNEVEN, learner={"gradient_checkpointing": on}) for on in (False, True)]
    for trainer in trainers:
        minibatch = trainer._microbatches(trainer.examples, range(len(UNEVEN)))
        accumulate_gradients(trainer._losses(trainer.learner.roles, minibatch))
    plain, checkpointed = (
        [parameter.grad.double() for parameter in trainer.model.parameters()] for trainer in trainers
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


# What evaluations decide, callbacks

EVERY_STEP = {"evaluation": {"every": 1}, "checkpoint": {"every": 1, "keep": 1}, "learner": {"epochs": 2}}


def test_several_held_out_sets_each_have_their_numbers(make, tmp_path):
    """What a set's are alone; `eval/nll` is the mean of the sets'."""
    sets = {"short": ROWS[:8], "long": ROWS[48:]}
    found = make(eval_examples=sets).evaluate()
    alone = {name: make(eval_examples=rows).evaluate() for name, rows in sets.items()}
    for name, metrics in alone.items():
        assert {key: found[f"eval/{name}/{key}"] for key in ("nll", "perplexity")} == {
            key: metrics[f"eval/{key}"] for key in ("nll", "perplexity")
        }
    assert found["eval/nll"] == sum(metrics["eval/nll"] for metrics in alone.values()) / 2
    assert found["eval/perplexity"] == torch.tensor(found["eval/nll"], dtype=torch.float64).exp().item()
    with pytest.raises(ValueError, match=r"eval_examples\['long'\]: the completion of row 0 is empty"):
        make(eval_examples={"short": ROWS, "long": [{"prompt": "a", "completion": ""}]})
    with pytest.raises(ValueError, match="eval_examples has a set named 'a b'"):
        make(eval_examples={"a b": ROWS})


def test_a_run_that_no_longer_improves_ends_and_goes_on_with_more_patience(make, tmp_path):
    """At learning rate 0 nothing ever does: small values of `eval/nll` are better without being told."""
    settings = EVERY_STEP | {"optimizer": {"lr": 0.0}, "eval_examples": ROWS[:8]}
    trainer = make(**settings | {"evaluation": {"every": 1, "patience": 2}})
    trainer.train()
    assert trainer.step == 2 and "eval/nll was best after step 0" in trainer.stopped
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    trainer = make(**settings | {"evaluation": {"every": 1, "patience": 4}})
    trainer.train(resume=True)
    assert trainer.step == 4
    with pytest.raises(ValueError, match="eval_examples is None, expected held-out rows with evaluation.patience 2"):
        make(evaluation={"every": 1, "patience": 2})


class Spoil(Callback):
    """Keeps the weights of each evaluation, and spoils the head once step `at` is saved; a resumed run knows what it has done."""

    def __init__(self, at):
        self.at, self.weights, self.calls = at, {}, []

    def on_evaluation(self, trainer, metrics):
        self.weights[trainer.step] = {name: value.clone() for name, value in trainer.model.state_dict().items()}

    def on_step(self, trainer, metrics):
        self.calls.append(trainer.step)

    @torch.no_grad()
    def on_checkpoint(self, trainer, path):
        if trainer.step == self.at:
            trainer.model.lm_head.weight.mul_(-100)

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = list(state["calls"])


def test_the_best_step_is_kept_and_callbacks_go_on_after_a_resume(make, tmp_path):
    """Every step makes it better until the head is spoiled after the third."""
    settings = EVERY_STEP | {"optimizer": {"lr": 1e-2, "schedule": "constant"}, "eval_examples": ROWS}
    settings["evaluation"] = {"every": 1, "keep_best": True}
    callback = Spoil(at=3)
    stopping = make(callbacks=[callback, StopAt("on_step", 5)], **settings)
    stopping.train()
    assert stopping.step == 5 and stopping.stopped == "seen enough" and stopping.best.step == 3
    again = Spoil(at=None)
    make(callbacks=[again], **settings).train(resume=True)
    assert again.calls == list(range(1, 9))
    assert list(list_checkpoints(tmp_path / "run" / "checkpoints")) == [3, 8]
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "best").state_dict()
    assert all(torch.equal(value, written[name]) for name, value in callback.weights[3].items())
    assert not torch.equal(written["lm_head.weight"], again.weights[8]["lm_head.weight"])


# Arguments


def test_arguments_that_cannot_be_used(make, tmp_path):
    with pytest.raises(ValueError, match="examples: row 0 has 90 tokens with its completion, expected at most 64"):
        make([{"prompt": "a", "completion": "b" * 88}])
    with pytest.raises(ValueError, match="eval_examples: the completion of row 0 is empty"):
        make(eval_examples=[{"prompt": "a", "completion": ""}])
    with pytest.raises(ValueError, match="tokenizer is None"):
        SFTTrainer(make_model(), examples=ROWS)
    with pytest.raises(ValueError, match="inside torch.autocast"), torch.autocast("cpu", torch.bfloat16):
        make()
    with pytest.raises(ValueError, match="eval_examples is None"):
        make().evaluate()
    assert not (tmp_path / "run").exists()


def test_a_model_is_trained_in_place_and_sampled_at_once(make):
    trainer = make(**SHORT)
    trainer.train()
    engine = Engine(trainer.model, trainer.tokenizer)
    assert engine.generate(["ab"], SamplingParams(max_new_tokens=2)).num_sequences == 1
