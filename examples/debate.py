"""A debate on the task of arithmetic.py: is a critic worth its tokens, or would they be better spent on more answers of one seat?

The pupil forgets 19 of 20 carries when he works on his own, but minds those that somebody points at. A solver works the sum out, a critic says in
which columns it thinks a carry is missing, and the solver tries again. One model sits in both seats; at first its critic points anywhere. PPO pays
the solver for a right last answer, and the critic for what its words changed. Beside it the same beginner learns by PPO to answer alone, from as many
sampled tokens. Then all answer the same held-out problems, by the majority of three answers or by one debate, which takes fewer tokens.
`docs/debate.md` has what this prints:

    python examples/debate.py [--seed N] [--steps N] [--output DIR]
"""

from __future__ import annotations

import argparse
import copy
import random
from pathlib import Path
from typing import NamedTuple

import torch
from arithmetic import HELD_OUT, TRAIN, make_model, make_problems, make_tokenizer, right_answer, worked_solution
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from fastppo import Engine, PPOConfig, PPOTrainer, SamplingParams, SFTConfig, SFTTrainer
from fastppo.console import Reporter
from fastppo.data.examples import load_examples
from fastppo.envs import Debate, Dialogue, Speech, hold_debates
from fastppo.run_folder import read_metrics
from fastppo.search import majority_vote
from fastppo.sft_config import ExamplesConfig

FORGETS = 0.95  # the share of carries that the pupil forgets where nobody points at them
COLUMNS = ("0", "2", "3", "23")  # what a critic may say: where a carry is missing, counted from the right; 0 is nowhere
IMITATION_EPOCHS = 1
VOTES = 3
MAX_NEW_TOKENS = 40  # of a speech; a worked solution takes 31

DEBATE = Debate([Speech("solver"), Speech("critic", "{prompt}{solver} "), Speech("solver", " {critic}=")])


def judge(seat: list[str], transcript: list[list[dict[str, str]]], answer: list[str], **_) -> list[float]:
    """The solver is paid for a right last answer, the critic for one that its words made right; it pays for one that they spoiled."""
    first, last = ([speeches[i]["text"] for speeches in transcript] for i in (0, 2))
    first, last = right_answer([], first, answer), right_answer([], last, answer)
    return [b if name == "solver" else b - a for name, a, b in zip(seat, first, last, strict=True)]


def lesson(prompt: str, rng: random.Random) -> list[dict[str, str]]:
    """What the beginner imitates of one problem: an answer alone, a critic's guess, and a second answer that minds what was pointed at."""
    first = worked_solution(prompt, lambda column: rng.random() < FORGETS)
    pointed = rng.choice(COLUMNS)
    second = worked_solution(prompt, lambda column: str(column) not in pointed and rng.random() < FORGETS)
    return [
        {"prompt": prompt, "completion": first},
        {"prompt": f"{prompt}{first} ", "completion": pointed},
        {"prompt": f"{prompt}{first}<eos> {pointed}=", "completion": second},
    ]


def teach_beginner(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], seed: int, output: str
) -> None:
    """Supervised imitation of the pupil in both seats."""
    rng = random.Random(seed)
    config = SFTConfig(
        output_dir=output,
        seed=seed,
        learner={"epochs": IMITATION_EPOCHS},
        optimizer={"lr": 6e-3, "warmup_steps": 20, "betas": (0.9, 0.95), "weight_decay": 0.1},
    )
    lessons = [example for prompt in prompts for example in lesson(prompt, rng)]
    as_they_stand = ExamplesConfig(rendered=True)  # what a solver reads has the end of its first speech in it
    examples = load_examples(lessons, tokenizer, as_they_stand)
    SFTTrainer(model, examples=examples, config=config, tokenizer=tokenizer, reporter=Reporter(0, quiet=True)).train()


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]], output: str, **choices
) -> int:
    """PPO of the model in place; returns how many tokens were sampled for it."""
    seed, steps = choices["seed"], choices["steps"]
    debate, groups = choices["debate"], {"prompts_per_step": 136, "samples_per_prompt": 4}
    if debate:  # a debate takes as many tokens as two answers
        groups = {"prompts_per_step": 128, "samples_per_prompt": 2}
    config = PPOConfig(
        output_dir=output,
        total_steps=steps,
        seed=seed,
        rollout={"batch_size": 256, "max_new_tokens": MAX_NEW_TOKENS} | groups,
        advantage={"gae_lambda": 1.0},
        loss={"clip_high": 0.28},
        critic={"kind": "shared", "lr": 3e-4, "value_clip": None},
        optimizer={"lr": 2e-4, "warmup_steps": 2, "schedule": "linear", "min_lr_ratio": 0.1},
        learner={"epochs": 2, "num_minibatches": 8},
    )
    PPOTrainer(
        model,
        reward=judge if debate else right_answer,
        environment=DEBATE if debate else None,
        prompts=rows,
        config=config,
        tokenizer=tokenizer,
    ).train()
    return round(sum(row["perf/tokens_per_second"] * row["time/step"] for row in read_metrics(output) if row["step"]))


class Figures(NamedTuple):
    """Shares of the held-out problems that were solved, and the tokens of an answer."""

    alone: float
    majority: float
    majority_tokens: float
    debate: float
    debate_tokens: float


def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]], seed: int
) -> Figures:
    """What the model solves alone and in debate, sampled as in training."""
    engine = Engine(model, tokenizer, max_batch_size=256)
    rows = [row | {"prompt_ids": tokenizer(row["prompt"])["input_ids"]} for row in rows]
    answers, prompts = [row["answer"] for row in rows], [row["prompt_ids"] for row in rows]
    sampling = SamplingParams(max_new_tokens=MAX_NEW_TOKENS, seed=seed)

    def solved(texts: list[str]) -> float:
        return sum(right_answer([], texts, answers)) / len(rows)

    found = majority_vote(
        engine,
        prompts,
        SamplingParams(n=VOTES, max_new_tokens=MAX_NEW_TOKENS, seed=seed),
        lambda text: text.rpartition("</think>")[2] or None,
    )
    majority = tokenizer.batch_decode([answer.completion for answer in found], skip_special_tokens=True)
    held = hold_debates(DEBATE, engine, rows, sampling, Dialogue(tokenizer, None))
    speeches = [[speech["text"] for speech in one.transcript(DEBATE)] for one in held.debates]
    return Figures(
        solved([first for first, _, _ in speeches]),
        solved(majority),
        sum(answer.new_tokens for answer in found) / len(rows),
        solved([last for _, _, last in speeches]),
        held.rollout.num_actions / len(rows),
    )


def main(argv: list[str] | None = None) -> dict[str, Figures]:
    """Prints a line for each policy; returns its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="PPO steps of each of the two runs (default 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", default="runs/debate-example", help="run folders begin so (default runs/debate-example)"
    )
    arguments = parser.parse_args(argv)
    folders = {name: f"{arguments.output}-{name}" for name in ("imitation", "alone", "debate")}
    for folder in folders.values():
        if Path(folder).exists():
            parser.error(f"--output needs the folder {folder!r}, which is there already: remove it or choose a new one")
    torch.manual_seed(arguments.seed)
    tokenizer = make_tokenizer()
    beginner = make_model(tokenizer)
    problems = make_problems(random.Random(arguments.seed), HELD_OUT + TRAIN)
    held_out, rows = problems[:HELD_OUT], problems[HELD_OUT:]
    teach_beginner(beginner, tokenizer, [row["prompt"] for row in rows], arguments.seed, folders["imitation"])
    figures = {"the beginner": measure(beginner, tokenizer, held_out, arguments.seed)}
    tokens = {"the beginner": 0}
    for name, debate in (("alone", False), ("debate", True)):
        model, who = copy.deepcopy(beginner), "trained in debate" if debate else "trained alone"
        choices = {"seed": arguments.seed, "steps": arguments.steps, "debate": debate}
        tokens[who] = train(model, tokenizer, rows, folders[name], **choices)
        figures[who] = measure(model, tokenizer, held_out, arguments.seed)
    print(
        f"\n| policy | sampled tokens it learned from | one answer | majority of {VOTES} (tokens) | one debate (tokens) |"
    )
    print("|---|---|---|---|---|")
    for who, found in figures.items():
        majority = f"{found.majority:.1%} ({found.majority_tokens:.0f})"
        debated = f"{found.debate:.1%} ({found.debate_tokens:.0f})"
        print(f"| {who} | {tokens[who]:,} | {found.alone:.1%} | {majority} | {debated} |", flush=True)
    return figures


if __name__ == "__main__":
    main()
