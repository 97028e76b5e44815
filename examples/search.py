"""What search is worth on the task of arithmetic.py: the careless pupil's answers, chosen and put together with a critic's help, then learned from.

The pupil's imitator stays as it is and forgets most carries. A critic learns from its attempts what each state is worth (PPO in which the policy
never moves), then every search answers the same held-out problems, with at most 8 times the tokens of a single answer. In the end one step of
expert iteration: the imitator learns what looking ahead found for training problems, and samples again. `docs/search.md` has what this prints:

    python examples/search.py [--seed N] [--problems N] [--output DIR]
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from arithmetic import HELD_OUT, MAX_NEW_TOKENS, TRAIN, imitate, make_model, make_problems, make_tokenizer, right_answer

from fastppo import PPOConfig, PPOTrainer, SamplingParams
from fastppo.search import Found, TreeParams, best_of_n, critic_values, majority_vote, puct, value_guided, value_score

CRITIC_STEPS = 24
TIMES = 8
SOLUTION = 31  # tokens of a worked solution, end-of-sequence included
AFTER = "one sample, after a round of expert iteration"
ROUND = 512  # training problems that the round of expert iteration searches


def train_critic(seed: int, output: str) -> tuple[PPOTrainer, list[dict[str, str]]]:
    """A trainer whose policy is the pupil's imitator and whose critic knows it, and the held-out problems."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    problems = make_problems(rng, HELD_OUT + TRAIN)
    held_out, train = problems[:HELD_OUT], problems[HELD_OUT:]
    imitate(model, tokenizer, [row["prompt"] for row in train], rng, f"{output}-imitation")
    config = PPOConfig(
        output_dir=output,
        total_steps=CRITIC_STEPS,
        seed=seed,
        rollout={"prompts_per_step": 128, "samples_per_prompt": 4, "batch_size": 256, "max_new_tokens": MAX_NEW_TOKENS},
        advantage={"gae_lambda": 1.0},
        critic={"kind": "separate", "lr": 1e-3, "value_clip": None, "warmup_steps": CRITIC_STEPS},
        learner={"epochs": 2, "num_minibatches": 8},
    )
    trainer = PPOTrainer(model, reward=right_answer, prompts=train, config=config, tokenizer=tokenizer)
    trainer.train()
    return trainer, held_out


def distil(trainer: PPOTrainer) -> PPOTrainer:
    """The trainer's run, one step of expert iteration further: its policy and its critic learn from what looking ahead found."""
    config = replace(
        trainer.config,
        algorithm="expert_iteration",
        total_steps=trainer.step + 1,
        search={"kind": "value-guided", "width": TIMES, "min_p": 0.05},
        rollout=replace(trainer.config.rollout, prompts_per_step=ROUND, samples_per_prompt=1),
        optimizer={"lr": 1e-3},
        learner={"epochs": 4, "num_minibatches": 8},
    )
    expert = PPOTrainer(
        trainer.model, reward=right_answer, prompts=trainer.prompts, config=config, tokenizer=trainer.tokenizer
    )
    expert.train(resume=True)
    return expert


def searches(trainer: PPOTrainer, rows: list[dict[str, str]], seed: int) -> dict[str, Callable[[], list[Found]]]:
    """By name, what answers the problems."""
    engine, values = trainer.engine, critic_values(trainer.roles)
    prompts = [trainer.tokenizer(row["prompt"])["input_ids"] for row in rows]
    params = TreeParams(step_strings=(",", "</think>"), step_tokens=10, budget=TIMES * SOLUTION)

    def sampling(**settings) -> SamplingParams:
        return SamplingParams(max_new_tokens=MAX_NEW_TOKENS, seed=seed, **settings)

    def is_right(numbers: list[int], completions: list[list[int]]) -> list[float]:
        texts = trainer.tokenizer.batch_decode(completions, skip_special_tokens=True)
        return right_answer([], texts, [rows[i]["answer"] for i in numbers])

    def said(text: str) -> str | None:
        return text.rpartition("</think>")[2] or None

    many = sampling(n=TIMES)
    return {
        "one sample": lambda: best_of_n(engine, prompts, sampling(), is_right),
        "always the likeliest token": lambda: best_of_n(engine, prompts, sampling(temperature=0), is_right),
        f"majority of {TIMES}": lambda: majority_vote(engine, prompts, many, said),
        f"best of {TIMES} by the critic": lambda: best_of_n(engine, prompts, many, value_score(values, prompts)),
        f"any right among {TIMES}": lambda: best_of_n(engine, prompts, many, is_right),
        "value-guided": lambda: value_guided(engine, prompts, sampling(min_p=0.05), values, width=TIMES),
        "PUCT": lambda: puct(engine, prompts, sampling(), values, params),
    }


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Prints a line for each search; returns the share of problems that each solved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--problems", type=int, default=HELD_OUT, help=f"held-out problems (default {HELD_OUT})")
    parser.add_argument("--output", default="runs/search", help="run folder of the critic (default runs/search)")
    arguments = parser.parse_args(argv)
    for folder in (arguments.output, f"{arguments.output}-imitation"):
        if Path(folder).exists():
            parser.error(f"--output needs the folder {folder!r}, which is there already: remove it or choose a new one")
    trainer, held_out = train_critic(arguments.seed, arguments.output)
    rows, solved = held_out[: arguments.problems], {}

    def measure(name: str, search: Callable[[], list[Found]]) -> None:
        start = time.perf_counter()
        found = search()
        seconds = time.perf_counter() - start
        texts = trainer.tokenizer.batch_decode([answer.completion for answer in found], skip_special_tokens=True)
        solved[name] = sum(right_answer([], texts, [row["answer"] for row in rows])) / len(rows)
        spent = [answer.new_tokens for answer in found]
        print(
            f"| {name} | {solved[name]:.1%} | {sum(spent) / len(spent):.0f} | {max(spent)} | {seconds:.1f} |",
            flush=True,
        )

    print("| search | solved | tokens an answer | most | seconds |\n|---|---|---|---|---|")
    for name, search in searches(trainer, rows, arguments.seed).items():
        measure(name, search)
    after = searches(distil(trainer), rows, arguments.seed)
    measure(AFTER, after["one sample"])
    return solved


if __name__ == "__main__":
    main()
