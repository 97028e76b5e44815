"""How work is divided among ranks, what they send each other for it, and runs that go on with another number of them."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastppo import Engine, SamplingParams, SFTConfig, SFTTrainer
from fastppo import distributed as ranks_module
from fastppo.console import Reporter
from fastppo.plan import Lengths, plan_epochs, split_again, tokens_of
from fastppo.rewards import RewardRunner, WeightedReward
from fastppo.rewards.result import RewardAnswers
from fastppo.run_folder import read_metrics, read_samples
from tests.distributed.namespaces import in_a_network_of_its_own
from tests.distributed.ranks import run_ranks
from tests.distributed.sharded import whole
from tests.envs.test_training import make as make_with_environment
from tests.tiny import make_model, make_tokenizer
from tests.tiny_trainer import PROMPTS, build_trainer, count_a
from tests.tolerance import assert_same_on_ranks
from tests.trainer.test_resume import stable

ROOT = Path(__file__).resolve().parents[2]


# Plans


def lengths_of_groups(groups: int, samples: int, seed: int) -> Lengths:
    """Completions of 1 to 400 tokens, most of them short, with prompts of 20 to 60."""
    draws = random.Random(seed)
    prompts = [draws.randint(20, 60) for _ in range(groups) for _ in range(samples)]
    for first in range(0, len(prompts), samples):
        prompts[first : first + samples] = [prompts[first]] * samples
    completions = [min(400, 1 + int(draws.expovariate(1 / 80))) for _ in prompts]
    sequences = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    return Lengths(sequences, prompts, [index // samples for index in range(len(prompts))])


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize(("groups", "samples"), [(128, 1), (32, 8), (16, 16)])
def test_ranks_get_as_many_micro_batches_and_tokens(groups, samples, ranks):
    lengths = lengths_of_groups(groups, samples, seed=ranks)
    options = {"epochs": 2, "num_minibatches": 2, "max_tokens": 1000, "seed": 0}
    plan = plan_epochs(lengths, **options, ranks=ranks)
    alone = plan_epochs(lengths, **options)
    for epoch, epoch_alone in zip(plan, alone, strict=True):
        for minibatch, undivided in zip(epoch, epoch_alone, strict=True):
            members = sorted(index for batch in minibatch for index in batch)
            assert members == sorted(index for batch in undivided for index in batch), "the same minibatches"
            assert len(minibatch) % ranks == 0
            assert all(tokens_of(batch, lengths) <= 1000 for batch in minibatch)
            tokens = [sum(tokens_of(batch, lengths) for batch in minibatch[rank::ranks]) for rank in range(ranks)]
            assert max(tokens) <= 1.05 * sum(tokens) / ranks
    assert split_again(alone, lengths, 1000, ranks) == plan


def test_the_samples_of_a_prompt_stay_together_where_that_is_even():
    lengths = lengths_of_groups(64, 4, seed=1)
    [[minibatch]] = plan_epochs(lengths, epochs=1, num_minibatches=1, max_tokens=1 << 30, seed=0, ranks=2)
    own = [{lengths.groups[index] for batch in minibatch[rank::2] for index in batch} for rank in range(2)]
    assert not own[0] & own[1]


def test_a_rank_without_work_has_empty_micro_batches():
    lengths = Lengths([9, 7, 5], [2, 2, 2], [0, 1, 2])
    [[minibatch]] = plan_epochs(lengths, epochs=1, num_minibatches=1, max_tokens=9, seed=0, ranks=5)
    assert minibatch == [[0], [1], [2], [], []]


# Sampling and scoring


def test_a_share_of_a_call_has_the_completions_of_the_whole():
    engine, sampling = Engine(make_model(), make_tokenizer()), SamplingParams(n=2, max_new_tokens=6, seed=5)
    whole = engine.generate(PROMPTS, sampling)
    shares = [engine.generate(PROMPTS[r::3], sampling, numbers=range(len(PROMPTS))[r::3]) for r in range(3)]
    joined = type(whole).of_shares(shares)
    for name in ("tokens", "logprobs", "prompt_index", "finish_reasons", "cu_seqlens", "position_ids"):
        assert torch.equal(getattr(joined, name), getattr(whole, name)), name
    with pytest.raises(ValueError, match=r"numbers has 1 entries, expected 2, one for each prompt"):
        engine.generate(PROMPTS[:2], sampling, numbers=[3])
    with pytest.raises(ValueError, match=r"numbers\[0\] is -1, expected"):
        engine.generate(PROMPTS[:1], sampling, numbers=[-1])


def sometimes(completions, **_):
    """None, a number, or a failure, by the completion."""
    if "z" in completions:
        raise ValueError("z")
    return [None if text == "n" else float(len(text)) for text in completions]


def test_scores_of_shares_are_those_of_the_whole():
    """Also what compares all completions; where a function fails for a share, that one is invalid."""
    runner = RewardRunner([WeightedReward(sometimes, normalise=True), count_a], timeout=None, retries=0)
    texts = ["a", "bb", "n", "dddd", "aaaaa"]
    places = [[0, 2, 4], [1, 3]]
    shares = [runner.answers([""] * len(own), [texts[i] for i in own], {}) for own in places]
    assert runner.result(RewardAnswers.of_shares(shares, places)) == runner([""] * 5, texts, {})
    shares[1] = runner.answers(["", ""], ["z", "dddd"], {})
    found = runner.result(RewardAnswers.of_shares(shares, places))
    assert [score == score for score in found.scores] == [True, False, True, False, True] and found.failures == 2
    assert "ValueError: z" in found.errors[0] and "the call failed" in found.errors[1]


def episodes(folder: str) -> dict[str, float]:
    return make_with_environment(folder, reward=count_a, eval_prompts=["ab", "c", "d"], total_steps=1).train()


def test_episodes_are_played_by_all_ranks(tmp_path):
    [alone] = run_ranks(1, episodes, str(tmp_path / "1"))
    for metrics in run_ranks(3, episodes, str(tmp_path / "3")):
        for name in alone:
            if not name.startswith(("time/", "perf/", "rollout/occ", "rollout/shared", "environment/waited")):
                assert metrics[name] == pytest.approx(alone[name], abs=1e-5), name
    ours, theirs = (read_samples(tmp_path / str(size)) for size in (1, 3))
    assert [row["turns"] for row in ours] == [row["turns"] for row in theirs]


# Other trainers, other launchers


def in_a_group_of_the_callers(folder: str) -> tuple[int, bool]:
    torch.distributed.init_process_group("gloo")
    trainer = build_trainer(folder, total_steps=1)
    trainer.train()
    return trainer.ranks.size, torch.distributed.is_initialized()


def test_a_process_group_that_the_caller_has_made_is_used(tmp_path):
    assert run_ranks(2, in_a_group_of_the_callers, str(tmp_path)) == [(2, True)] * 2


def test_one_process_makes_no_process_group(tmp_path):
    assert run_ranks(1, without_a_group, str(tmp_path)) == [(1, False)]


def without_a_group(folder: str) -> tuple[int, bool]:
    trainer = build_trainer(folder, total_steps=1)
    trainer.train()
    return trainer.ranks.size, torch.distributed.is_initialized()


def imitate(folder: str, sharding: str = "none"):
    """Metrics, weights, and those that are written in the end."""
    rows = [{"prompt": "ab" * (n % 3 + 1), "completion": "cd" * (n % 5) + "e"} for n in range(11)]
    learner = {"minibatch_size": 4, "tokens_per_microbatch": 12}
    config = SFTConfig(output_dir=folder, device="cpu", learner=learner, distributed={"sharding": sharding})
    options = {"tokenizer": make_tokenizer(), "reporter": Reporter(0, quiet=True), "eval_examples": rows[:5]}
    trainer = SFTTrainer(make_model(), examples=rows, config=config, **options)
    metrics = trainer.train()
    weights = torch.cat([whole(parameter).flatten() for parameter in trainer.model.parameters()])
    return metrics, weights.detach(), load_file(Path(folder) / "model" / "model.safetensors")


def imitate_in_both_ways(folder: str):
    return [imitate(f"{folder}/{sharding}", sharding) for sharding in ("none", "full")]


def test_fine_tuning_on_several_ranks(tmp_path):
    """Of whole weights, and of weights that are divided."""
    alone, weights, written = imitate(str(tmp_path / "1"))
    for metrics, found, saved in chain(*run_ranks(2, imitate_in_both_ways, str(tmp_path / "2"))):
        assert metrics["loss/nll"] == pytest.approx(alone["loss/nll"], abs=1e-5)
        assert metrics["eval/nll"] == pytest.approx(alone["eval/nll"], abs=1e-5)
        assert_same_on_ranks(found, weights)
        assert saved.keys() == written.keys()
        for name, weight in written.items():
            assert_same_on_ranks(saved[name], weight, name)


# Runs that go on


def go_on(folder: str, steps: int, resume: bool) -> list[torch.Tensor]:
    every = {"checkpoint__every": 1, "evaluation__every": 2}
    trainer = build_trainer(folder, total_steps=steps, eval_prompts=["ab", "c"], **every)
    trainer.train(resume=resume)
    return [parameter.detach().clone() for parameter in trainer.roles.parameters()]


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> tuple[Path, list[torch.Tensor]]:
    """A run of two ranks after two of four steps, and its weights."""
    folder = tmp_path_factory.mktemp("half") / "run"
    return folder, run_ranks(2, go_on, str(folder), 2, False)[0]


def test_two_ranks_go_on_bit_for_bit(half, tmp_path):
    """Resumed after two of four steps, in new processes."""
    whole = run_ranks(2, go_on, str(tmp_path / "whole"), 4, False)
    shutil.copytree(half[0], tmp_path / "parts")
    parts = run_ranks(2, go_on, str(tmp_path / "parts"), 4, True)
    for ours, theirs in zip(parts, whole, strict=True):
        assert all(map(torch.equal, ours, theirs))
    ours, theirs = ([without_waits(row) for row in read_metrics(tmp_path / name)] for name in ("whole", "parts"))
    assert ours == theirs


def without_waits(row: dict) -> dict:
    return {name: value for name, value in stable(row).items() if not name.startswith("distributed/")}


@pytest.mark.parametrize("size", [1, 3])
def test_any_number_of_ranks_goes_on_from_the_same_weights(size, half, tmp_path):
    folder, before = half
    shutil.copytree(folder, tmp_path / "run")
    for weights in run_ranks(size, go_on, str(tmp_path / "run"), 2, True):  # has all its steps
        assert all(map(torch.equal, weights, before))


# What is sent


def sent_in_a_step(folder: str) -> tuple[dict[str, int], int, int, dict]:
    changes = {"total_steps": 1, "learner__epochs": 3, "critic__kind": "separate", "reward__kl_coef": 0.1}
    trainer = build_trainer(folder, **changes, rollout__recompute_logprobs="always")
    rollouts, sample = [], trainer.collector.sample
    trainer.collector.sample = lambda *a, **o: rollouts.append(sample(*a, **o)) or rollouts[-1]
    metrics = trainer.train()
    learn = sum(m.numel() for o in trainer.learner.optimizers.values() for m in o.masters.values())
    return dict(trainer.ranks.sent), learn, rollouts[0].rollout.num_actions, metrics


def test_bytes_of_a_step_are_those_of_the_formula(tmp_path):
    """docs/distributed.md: 4 P a minibatch for P numbers that learn, 4 N for each of log-probs, values and reference of N actions."""
    for sent, learn, actions, metrics in run_ranks(2, sent_in_a_step, str(tmp_path)):
        minibatches = 2 * 3
        assert sent["gradients"] == 4 * learn * minibatches
        assert sent["evaluation"] == 4 * actions * 3
        assert metrics["distributed/sent_mb"] * 1e6 <= sum(sent.values())
        others = sum(sent.values()) - sent["gradients"] - sent["evaluation"]
        assert 0 < others < 100_000, "records and meetings of a tiny step"


def sums(buckets: list[int]) -> list[list[torch.Tensor]]:
    ranks = ranks_module.ranks_of(ranks_module.DistributedConfig(), torch.device("cpu"))
    number, found = ranks.rank + 1.0, []
    for bucket in buckets:
        ranks_module.BUCKET = bucket
        tensors = [torch.full((3, 4), number), torch.full((5,), number, dtype=torch.float64), torch.zeros(0)]
        tensors += [torch.full((6, 2), number).t(), torch.full((50,), number), torch.full((), number)]
        ranks.sum_("tensors", tensors)
        found.append(tensors)
    return found


def test_sums_of_any_shapes_and_types():
    """Whether tensors are larger or smaller than what is summed at a time."""
    for tensors in chain(*run_ranks(3, sums, [1, 10, 1000])):
        assert [tuple(tensor.shape) for tensor in tensors] == [(3, 4), (5,), (0,), (2, 6), (50,), ()]
        assert all((tensor == 6).all() for tensor in tensors) and tensors[1].dtype == torch.float64


COUNTING = """
import json, sys
from tests.distributed.namespaces import in_a_network_of_its_own
from tests.distributed.ranks import run_ranks
from tests.distributed.sharded import whole
from tests.distributed.test_shares import counted
print(json.dumps(run_ranks(int(sys.argv[1]), counted)[0]))
"""


def counted() -> list[int]:
    """[bytes that the formula gives for all ranks, bytes that the loopback device has carried]"""
    ranks = ranks_module.ranks_of(ranks_module.DistributedConfig(), torch.device("cpu"))
    tensors = [torch.ones(300_000), torch.ones(1000, 700)]
    ranks.sum_("warm", [torch.ones(1)])
    before = _carried()
    ranks.exchange("before")
    for _ in range(3):
        ranks.sum_("it", tensors)
    ranks.exchange("after")
    return [2 * (ranks.size - 1) * ranks.sent["it"], _carried() - before]


def _carried() -> int:
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def test_bytes_are_those_that_the_network_carries():
    """In a network namespace of its own: a sum of M bytes over R ranks takes 2 (R - 1) M, as a ring does."""
    command = in_a_network_of_its_own(sys.executable, "-c", COUNTING, "3")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    formula, carried = map(int, done.stdout.strip().splitlines()[-1].strip("[]").split(","))
    assert formula <= carried <= 1.05 * formula
