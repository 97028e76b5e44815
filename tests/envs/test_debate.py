"""Debates: who reads what, what each seat is paid, and what a debate that cannot go on costs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from fastppo import PPOTrainer
from fastppo.envs import Debate, Dialogue, Speech, hold_debates
from fastppo.envs.source import Debates
from fastppo.errors import CheckpointError, TrainingError
from fastppo.export import export_run
from fastppo.model import load_model, prepare_model
from fastppo.plan import Lengths, plan_epochs
from fastppo.roles import Roles
from fastppo.rollout import FinishReason, SamplingParams
from fastppo.run_folder import read_metrics
from fastppo.search import critic_values, load_critic
from tests.envs.chat import make_chat_tokenizer, trl_template
from tests.envs.test_training import Dying
from tests.envs.test_training import make as make_trainer
from tests.envs.worlds import ROWS, make_engine, rows_of
from tests.tiny import make_model, make_tokenizer
from tests.tiny_trainer import PROMPTS
from tests.tolerance import assert_rounds_to, assert_same_in_fp64

DEBATE = Debate(
    [Speech("pro"), Speech("con", "{prompt}n"), Speech("pro", "c{con}"), Speech("judge", "{prompt}{pro}o{con}")]
)
OWN = Debate(DEBATE.speeches, own_adapters=True)
LORA = {"lora__r": 2, "critic__kind": "lora", "optimizer__lr": 1e-2}
SAMPLING = SamplingParams(n=2, max_new_tokens=5, seed=3)


def debate_of(engine=None, *, debate=DEBATE, rows=ROWS, **options):
    engine = engine or make_engine()
    dialogue = Dialogue(engine.tokenizer, None)
    return hold_debates(debate, engine, rows_of(engine.tokenizer, rows), SAMPLING, dialogue, **options)


def texts(held, tokenizer):
    """Of each sequence (prompt, what follows), end-of-sequence tokens left out."""
    prompts, completions = held.rollout.prompts(), held.rollout.completions()
    decode = [tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (prompts, completions)]
    return list(zip(*decode, strict=True))


@pytest.fixture(scope="module")
def held():
    return debate_of()


def test_each_seat_reads_what_its_templates_say(held):
    """The sequence of a seat holds its own words and what it read, and nothing else."""
    sequences = texts(held, make_tokenizer())
    for number, one in enumerate(held.debates):
        question = ROWS[number // SAMPLING.n]["prompt"]
        said = [speech["text"] for speech in one.transcript(DEBATE)]
        assert [speech["seat"] for speech in one.transcript(DEBATE)] == ["pro", "con", "pro", "judge"]
        assert sequences[3 * number : 3 * number + 3] == [
            (question, f"{said[0]}c{said[1]}{said[2]}"),
            (f"{question}n", said[1]),
            (f"{question}{said[2]}o{said[1]}", said[3]),
        ]


def test_only_the_seats_own_words_are_actions(held):
    rollout = held.rollout
    said = [[turn.completion for turn in e.turns] for one in held.debates for e in one.seats.values()]
    chosen = rollout.tokens[rollout.actions].tolist()
    for own, begin, end in zip(said, rollout.action_bounds, rollout.action_bounds[1:], strict=False):
        assert make_tokenizer().decode(chosen[begin:end], skip_special_tokens=True) == "".join(own)
    assert rollout.prompt_index.tolist() == [
        3 * prompt + seat for prompt in range(4) for _ in range(2) for seat in range(3)
    ]


def test_log_probs_are_those_of_the_sequences(held):
    """What a seat read counts as its past: the model scores its words with the log-probs that they were sampled with."""
    rollout, engine = held.rollout, make_engine()
    plan = plan_epochs(Lengths.of(rollout), epochs=1, num_minibatches=1, max_tokens=512, seed=0)
    found = Roles(engine.model, critic="none").evaluate(rollout, {"logprobs"}, plan, "always")
    assert torch.equal(found.logprobs, rollout.logprobs)


def test_who_else_debates_changes_nothing(held):
    alone = debate_of(make_engine(max_batch_size=2))
    assert torch.equal(alone.rollout.tokens, held.rollout.tokens)
    assert torch.equal(alone.rollout.logprobs, held.rollout.logprobs)
    first = debate_of(rows=ROWS[:1]).rollout
    assert torch.equal(first.tokens, held.rollout.select(range(first.num_sequences)).tokens)


def test_debates_that_were_divided_are_those_of_one_place(held):
    shares = [Debates(debate_of(numbers=own), DEBATE).to(torch.device("cpu")) for own in ([0, 2], [1, 3])]
    whole = Debates.of_shares(shares)
    for name in ("tokens", "logprobs", "prompt_index", "finish_reasons", "action_mask"):
        assert torch.equal(getattr(whole.rollout, name), getattr(held.rollout, name)), name
    groups = whole.groups(ROWS)
    assert whole.columns(groups) == Debates(held, DEBATE).columns(groups)


# Training


def pays(seat, transcript, **_):
    """pro for the letter a, con for b, the judge nothing."""
    letters = {"pro": "a", "con": "b"}
    return [
        float(sum(speech["text"].count(letters[name]) for speech in speeches if speech["seat"] == name))
        if name in letters
        else 0.0
        for name, speeches in zip(seat, transcript, strict=True)
    ]


def make(output_dir, debate=DEBATE, **options) -> PPOTrainer:
    return make_trainer(output_dir, debate, **{"reward": pays} | options)


def test_a_run_records_each_seat(tmp_path):
    make(tmp_path, eval_prompts=["ab", "c"], num_logged_samples=6, reward__kl_coef=0.1).train()
    rows, samples = (
        read_metrics(tmp_path),
        [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()],
    )
    assert rows[0]["eval/scores"] == 0  # the judge's, who speaks last
    for row in rows[1:]:
        seats = {name: row[f"seat/{name}/reward"] for name in ("pro", "con", "judge")}
        assert seats["judge"] == 0 < row["seat/pro/tokens"] and row["debate/failure_rate"] == 0
        assert row["objective/scores"] == pytest.approx(sum(seats.values()) / 3) and "objective/kl" in row
    assert [sample["seat"] for sample in samples[:6]] == ["pro", "con", "judge"] * 2
    for sample in samples:
        said = "".join(speech["text"] for speech in sample["transcript"] if speech["seat"] == sample["seat"])
        assert "".join(sample["tokens"]).replace("<eos>", "").replace("<pad>", "") == said
        assert sample["score"] == pays([sample["seat"]], [sample["transcript"]])[0] and sample["error"] is None
        assert len(sample["values"]) == len(sample["advantages"]) == len(sample["tokens"])


@pytest.mark.parametrize(
    "changes",
    [
        {"advantage__estimator": "grpo", "rollout__samples_per_prompt": 4},
        {"advantage__estimator": "remax"},
        {"rollout__dynamic_sampling": True, "rollout__samples_per_prompt": 4, "rollout__prompts_per_step": 4},
        {"difficulty__easy_weight": 0.5},
        {"algorithm": "trpo", "critic__kind": "shared"},
    ],
    ids=lambda changes: next(iter(changes.values())),
)
def test_every_algorithm_takes_debates(tmp_path, changes):
    assert "seat/con/reward" in make(tmp_path, **{"total_steps": 1} | changes).train()


def test_samples_of_a_group_have_one_seat(tmp_path):
    """Who is compared with whom: GRPO's advantages are 0 where each seat always earns the same, however much seats differ."""

    def by_seat(seat, **_):
        return [float(len(name)) for name in seat]

    make(tmp_path, reward=by_seat, advantage__estimator="grpo", rollout__samples_per_prompt=4, total_steps=1).train()
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert {sample["seat"] for sample in samples} > {"pro"}
    assert not any(number for sample in samples for number in sample["advantages"])


@pytest.mark.parametrize("debate", [DEBATE, OWN], ids=["one policy", "an adapter a seat"])
def test_a_run_that_broke_off_goes_on_bit_for_bit(tmp_path, monkeypatch, debate):
    settings = {"total_steps": 3, "checkpoint__every": 1, "rollout__samples_per_prompt": 2}
    settings |= LORA if debate.own_adapters else {}
    whole = make(tmp_path / "whole", debate, **settings)
    whole.train()
    broken = make(tmp_path / "broken", debate, **settings)
    Dying(monkeypatch, broken, 2)
    with pytest.raises(RuntimeError, match="power cut"):
        broken.train()
    resumed = make(tmp_path / "broken", debate, **settings)
    resumed.train(resume=True)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_a_conversation_keeps_what_stands_before_the_question(tmp_path):
    """The seats' readings are the user's messages, after the row's own."""
    tokenizer = make_chat_tokenizer(trl_template("qwen2_5"))
    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=1024)
    seen = []

    def looks(prompts, completions, **_):
        seen.extend(completions)
        return [0.0] * len(prompts)

    prompts = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]]
    debate = Debate([Speech("a"), Speech("b", "{prompt} {a}!"), Speech("a", "{b}?")])
    options = {"total_steps": 1, "rollout__prompts_per_step": 1}
    make(tmp_path, debate, reward=looks, prompts=prompts, tokenizer=tokenizer, model=model, **options).train()
    a, b = (json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines())
    said = [speech["text"] for speech in a["transcript"]]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"2+2? {said[0]}!"}]
    assert tokenizer.decode(b["prompt_ids"]) == tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    assert f"<|im_start|>user\n{said[1]}?<|im_end|>" in tokenizer.decode(a["completion_ids"])
    assert seen == [[{"role": "assistant", "content": text}] for text in (said[2], said[1])]


# An adapter a seat


def change_of(trainer, role) -> float:
    """How far the seat's adapter is from one that changes nothing."""
    adapter = trainer.adapters.policy if role == "policy" else role
    named = trainer.adapters.parameters(adapter).items()
    return max(p.abs().max().item() for name, p in named if ".lora_B." in name)


def test_each_seat_speaks_with_its_own_adapter(tmp_path):
    """Once adapters differ, what a seat said is scored with the bits that it was sampled with, all seats' in one batch; not by another adapter."""
    trainer = make(tmp_path, OWN, **LORA, total_steps=3, reward__kl_coef=0.1)
    assert trainer.train()["rollout/logprob_diff_max"] == 0
    assert trainer.adapters.seats == {"pro": "seat_pro", "con": "seat_con", "judge": "policy"}
    rows = rows_of(trainer.tokenizer)
    held = hold_debates(
        OWN, trainer.engine, rows, SAMPLING, Dialogue(trainer.tokenizer, None), adapters=trainer.adapters
    )
    rollout, policy_alone = held.rollout, {"speakers": None}
    plan = plan_epochs(Lengths.of(rollout), epochs=1, num_minibatches=1, max_tokens=256, seed=0)
    found = trainer.roles.evaluate(rollout, {"logprobs"}, plan, "always").logprobs
    assert torch.equal(found, rollout.logprobs)
    others = trainer.roles.evaluate(replace(rollout, **policy_alone), {"logprobs"}, plan, "always").logprobs
    same = (others == rollout.logprobs).split(rollout.action_counts)
    assert [part.all().item() for part in same] == [False, False, True] * len(held.debates)


def test_a_seats_adapter_learns_from_its_own_words_alone(tmp_path):
    """Without a critic a seat that always earns the same has nothing to learn."""
    settings = {"advantage__estimator": "grpo", "rollout__samples_per_prompt": 4, "critic__kind": "none"}
    trainer = make(tmp_path, OWN, **LORA | settings)
    trainer.train()
    assert change_of(trainer, "policy") == 0  # the judge's
    assert change_of(trainer, "seat_pro") > 0 < change_of(trainer, "seat_con")


@pytest.mark.parametrize("critic", ["lora", "shared"])
def test_gradients_are_those_of_each_seats_sequences(tmp_path, critic):
    """All seats in one batch, or one seat after another."""
    trainer = make(tmp_path, OWN, **LORA | {"critic__kind": critic})
    trainer.train()
    rows = rows_of(trainer.tokenizer)
    rollout = hold_debates(
        OWN, trainer.engine, rows, SAMPLING, Dialogue(trainer.tokenizer, None), adapters=trainer.adapters
    ).rollout
    trainer.roles.to(torch.float64)
    seats = [[i for i, name in enumerate(rollout.speakers) if name == role] for role in trainer.adapters.seats.values()]

    def gradients(batches) -> dict[str, torch.Tensor]:
        trainer.model.zero_grad()
        for batch in batches:
            outputs = trainer.roles(rollout.select(batch))
            (outputs.logprobs.sum() + outputs.values.sum() + outputs.final_values.sum()).backward()
        return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}

    shuffled = [i for three in zip(*seats, strict=True) for i in three]
    together, apart = gradients([shuffled]), gradients(seats)
    assert together.keys() == apart.keys() and {"seat_pro", "seat_con"} <= {
        part for name in apart for part in name.split(".")
    }
    for name, gradient in together.items():
        assert_same_in_fp64(gradient, apart[name], name)


def test_all_adapters_are_written_and_exported(tmp_path):
    trainer = make(tmp_path / "run", OWN, **LORA, checkpoint__every=1)
    trainer.train()
    make_model(max_position_embeddings=128).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    export_run(tmp_path / "run", folder=tmp_path / "exported", model=str(tmp_path / "base"), adapter=True)
    for seat, role in trainer.adapters.seats.items():
        place = "." if role == "policy" else seat
        written = [
            load_file(folder / place / "adapter_model.safetensors")
            for folder in (tmp_path / "run" / "adapter", tmp_path / "exported")
        ]
        own = trainer.adapters.parameters(trainer.adapters.policy if role == "policy" else role).values()
        assert {p.sum().item() for p in own} == {x.sum().item() for x in written[0].values()}
        assert written[0].keys() == written[1].keys()
        assert all(torch.equal(x, written[1][name]) for name, x in written[0].items())


def test_a_critic_on_the_policys_trunk_is_read_with_the_adapter_of_who_answers(tmp_path):
    base = tmp_path / "base"
    make_model(max_position_embeddings=128).save_pretrained(base)
    model = load_model(base, dtype="float32", device="cpu")
    trainer = make(tmp_path / "run", OWN, model=model, **LORA | {"critic__kind": "shared", "critic__lr": 1e-2})
    trainer.train()
    assert change_of(trainer, "policy") > 0 < change_of(trainer, "seat_pro")
    written = prepare_model(load_model(tmp_path / "run" / "model", dtype="float32", device="cpu"))
    states = [[2, 3], [4], [2, 3, 4]]
    said, expected = (critic_values(x)(states) for x in (load_critic(tmp_path / "run", written), trainer.roles))
    assert_rounds_to(torch.tensor(said), torch.tensor(expected).double())
    assert len(set(said)) == 3


def test_a_run_goes_on_with_the_adapters_that_it_had(tmp_path):
    make(tmp_path, OWN, **LORA, checkpoint__every=1).train()
    with pytest.raises(CheckpointError, match=r"lora.seats is \[\], was \[\['pro', 'seat_pro'\]"):
        make(tmp_path, DEBATE, **LORA, checkpoint__every=1).train(resume=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "environment: own_adapters of the debate is True, expected False without adapters"),
        (
            LORA | {"algorithm": "trpo", "critic__kind": "shared"},
            "environment: own_adapters of the debate is True, expected False with algorithm trpo",
        ),
    ],
)
def test_own_adapters_where_there_can_be_none(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, OWN, **settings)
    assert not list(tmp_path.iterdir())


# What cannot be


def test_a_debate_without_room_is_invalid(tmp_path):
    """The others are learned from."""
    prompts = ["a" * 40, "b", "c", "d"]
    debate = Debate([Speech("pro"), Speech("con", "{prompt}{prompt}{pro}"), Speech("pro", "{con}")])
    settings = {
        "reward__max_failure_rate": 0.5,
        "rollout__prompts_per_step": 4,
        "environment__max_tokens": 60,
        "total_steps": 1,
    }
    metrics = make(tmp_path, debate, prompts=prompts, **settings).train()
    assert metrics["debate/failure_rate"] == 0.25 and metrics["rewards/failures"] == 2
    why = "1 of 4 debates are invalid: ValueError: speech 1, of con, has 8[0-9] tokens before it, expected at most 59"
    with pytest.raises(TrainingError, match=why):
        make(tmp_path / "strict", debate, prompts=prompts, **settings | {"reward__max_failure_rate": 0.1}).train()


def test_broken_logits_cost_the_whole_debate():
    engine = make_engine()
    with torch.no_grad():
        engine.model.get_input_embeddings().weight[make_tokenizer()("n")["input_ids"][0]] = torch.nan
    held = debate_of(engine, rows=[{"prompt": "ab"}])
    assert {one.error for one in held.debates} == {"the model's logits were NaN or infinite"}
    assert set(held.rollout.finish_reasons.tolist()) == {FinishReason.ERROR}
    assert held.debates[0].transcript(DEBATE)[-1] == {"seat": "judge", "text": ""}


def raises(prompts, **_):
    raise ConnectionError("the judge has left")


def counts_debates(prompts, **_):
    return [0.0] * (len(prompts) // 3)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (raises, "reward 'raises' failed .attempt 1 of 2.: ConnectionError: the judge has left"),
        (counts_debates, "reward 'counts_debates' failed .attempt 1 of 2.*8 .*24"),
    ],
)
def test_a_judge_that_fails_ends_the_run_with_the_reason(tmp_path, reward, message):
    with pytest.raises(TrainingError, match=message):
        make(tmp_path, reward=reward).train()


def test_somebody_has_to_judge(tmp_path):
    with pytest.raises(ValueError, match="reward: None pays no seat of the debate, expected a function: its judge"):
        make(tmp_path, reward=None)


@pytest.mark.parametrize(
    ("debate", "prompts", "message"),
    [
        (
            Debate([Speech("pro"), Speech("con", "{prompt}{prp}")]),
            PROMPTS,
            r"prompts: speeches\[1\].reads of the debate has {prp}, expected a seat that has spoken \(pro, con\) or a column \(prompt\)",
        ),
        (DEBATE, [{"prompt": "a", "con": "b"}], "prompts: the data has a column 'con', expected another name"),
        (DEBATE, [{"prompt": "a", "seat": "b"}], "prompts: the data has a column 'seat', expected another name"),
    ],
)
def test_names_that_mean_nothing_or_two_things_are_refused_before_the_run(tmp_path, debate, prompts, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, debate, prompts=prompts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speeches": [Speech("a"), Speech("a", "more")]}, r"speeches has the seats \['a'\], expected at least two"),
        ({"speeches": [Speech("a"), Speech("b"), Speech("a")]}, r"speeches\[2\].reads is None, expected a text"),
        (
            {"speeches": [Speech("a", "{b}"), Speech("b")]},
            r"speeches\[0\].reads has {b}, expected a seat that has spoken before",
        ),
        (
            {"speeches": [Speech("a"), Speech("b", "{a")]},
            r"speeches\[1\].reads is '{a': expected '}' before end of string",
        ),
        ({"speeches": [Speech("a"), Speech("b", "{a!r}")]}, r"speeches\[1\].reads has {a}, expected the plain name"),
        ({"speeches": [Speech("a"), Speech("b")], "answers": "c"}, "answers is 'c', expected one of the seats a, b"),
    ],
)
def test_what_is_no_debate_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Debate(**settings)
