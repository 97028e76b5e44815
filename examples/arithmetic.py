"""PPO teaches a language model to carry, in about a minute on a laptop CPU.

A tiny Llama (0.1 M parameters, a token for each character) first imitates a careless pupil: he adds column by column inside <think>, but forgets
most of his carries. It learns his way of writing, his sums and his carelessness: nearly all its answers are wrong. PPO then samples the model's own
attempts and rewards the right answers, nothing else, and the model finds out that the carry pays. Run it with `make demo`, or

    python examples/arithmetic.py [--steps N] [--seed N] [--output DIR]
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections.abc import Callable, Iterable
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastppo import PPOConfig, PPOTrainer, SFTConfig, SFTTrainer
from fastppo.console import Reporter
from fastppo.rollout import SamplingParams

DIGITS = 3
FORGETS = 0.8  # the share of his carries that the pupil forgets
TRAIN, HELD_OUT = 8192, 256  # problems
IMITATION_EPOCHS = 2
MAX_NEW_TOKENS = 40  # a worked solution takes 31


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character, and one for each tag."""
    tokens = ["<pad>", "<eos>", "<think>", "</think>", *"0123456789+= ,"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens(["<think>", "</think>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 2 layers and width 64, randomly initialised."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=96,
        # Weights and rotary base suit the small width and the short texts: with Transformers' defaults, made for models a
        # thousand times larger, the imitation takes several times as long.
        initializer_range=0.125,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def make_problems(rng: random.Random, count: int) -> list[dict[str, str]]:
    """Sums that need at least one carry, no two of the same numbers in either order."""
    problems: dict[tuple[int, int], dict[str, str]] = {}
    while len(problems) < count:
        a, b = (rng.randrange(10 ** (DIGITS - 1), 10**DIGITS) for _ in range(2))
        prompt = f"{a}+{b}="
        if worked_solution(prompt) != worked_solution(prompt, forgets=lambda column: True):
            problems[min(a, b), max(a, b)] = {"prompt": prompt, "answer": str(a + b)}
    return list(problems.values())


def worked_solution(prompt: str, forgets: Callable[[int], bool] = lambda column: False) -> str:
    """The schoolbook way: columns from the right, each with the carry of the one before, then the answer that they make.

    `47+85=` gives `<think>7+5=12,4+8+1=13</think>132`. Who `forgets(2)`, the carry to the second column, writes `4+8+0=12`, and 122.
    """
    a, b = prompt.rstrip("=").split("+")
    steps, digits, carry = [], "", None
    for column, (x, y) in enumerate(zip(reversed(a), reversed(b), strict=True), start=1):
        total = int(x) + int(y) + (carry or 0)
        steps.append(f"{x}+{y}" + ("" if carry is None else f"+{carry}") + f"={total:02}")
        digits = f"{total % 10}{digits}"
        carry = int(total >= 10 and not forgets(column + 1))
    return f"<think>{','.join(steps)}</think>{total // 10 or ''}{digits}"


def right_answer(prompts: list[str], completions: list[str], answer: list[str], **_) -> list[float]:
    """The verifiable reward: 1 for exactly the right number after the reasoning, else 0."""
    return [float(text.rpartition("</think>")[2] == right) for text, right in zip(completions, answer, strict=True)]


def imitate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], rng: random.Random, output: str
) -> float:
    """Supervised imitation of the careless pupil's solutions; returns the last loss in nats a token."""
    config = SFTConfig(
        output_dir=output,
        seed=rng.randrange(2**32),
        learner={"epochs": IMITATION_EPOCHS},
        optimizer={"lr": 6e-3, "warmup_steps": 20, "betas": (0.9, 0.95), "weight_decay": 0.1},
    )
    solutions = [worked_solution(prompt, lambda column: rng.random() < FORGETS) for prompt in prompts]
    examples = [{"prompt": prompt, "completion": text} for prompt, text in zip(prompts, solutions, strict=True)]
    trainer = SFTTrainer(model, examples=examples, config=config, tokenizer=tokenizer, reporter=Reporter(0, quiet=True))
    return trainer.train()["loss/nll"]


class Attempt(NamedTuple):
    text: str
    right: bool
    mistake: str  # the first step that is not as in the careful solution, "" where there is none
    forgot_carry: bool  # that step has +0 in the place of +1


def judge(row: dict[str, str], text: str) -> Attempt:
    """Whether the answer is right, and what went wrong first."""
    right = right_answer([], [text], [row["answer"]]) == [1]
    pairs = zip_longest(steps(worked_solution(row["prompt"])), steps(text), fillvalue="nothing")
    careful, written = next((pair for pair in pairs if pair[0] != pair[1]), ("", ""))
    carries = re.fullmatch(r"(\d\+\d\+)1=\d\d", careful)
    forgot_carry = carries is not None and written.startswith(carries[1] + "0=")
    return Attempt(text, right, f"{written}, should be {careful}" if careful else "", forgot_carry)


def steps(solution: str) -> list[str]:
    """The columns' sums and the answer."""
    return re.split(r"<think>|,|</think>", solution)[1:]


def attempts(trainer: PPOTrainer, rows: list[dict[str, str]], samples: int = 0) -> list[Attempt]:
    """The model's solutions of some problems: `samples` of each, drawn as in training, or the greedy one."""
    prompts = [trainer.tokenizer(row["prompt"])["input_ids"] for row in rows]
    sampling = SamplingParams(n=max(samples, 1), temperature=float(samples > 0), max_new_tokens=MAX_NEW_TOKENS)
    rollout = trainer.engine.generate(prompts, sampling)
    texts = trainer.tokenizer.batch_decode(rollout.completions(), skip_special_tokens=True)
    return [judge(rows[i], text) for i, text in zip(rollout.prompt_index.tolist(), texts, strict=True)]


class HeldOut(NamedTuple):
    """Attempts at the held-out problems, none of which was ever trained on."""

    sampled: list[Attempt]
    greedy: list[Attempt]

    def figures(self) -> dict[str, float]:
        """Shares of 1."""
        return {
            "solved, sampled as in training": share(attempt.right for attempt in self.sampled),
            "solved, always the likeliest token": share(attempt.right for attempt in self.greedy),
            "first mistake a forgotten carry, sampled": share(attempt.forgot_carry for attempt in self.sampled),
        }


def share(truths: Iterable[bool]) -> float:
    truths = list(truths)
    return sum(truths) / len(truths)


def try_held_out(trainer: PPOTrainer, rows: list[dict[str, str]]) -> HeldOut:
    return HeldOut(attempts(trainer, rows, samples=4), attempts(trainer, rows))


def show(console: Console, rows: list[dict[str, str]], before: HeldOut, after: HeldOut) -> None:
    """The figures before and after, and some solutions that were wrong before."""
    table = Table("held-out problems", "before PPO", "after", box=None, header_style="bold")
    for (name, was), now in zip(before.figures().items(), after.figures().values(), strict=True):
        table.add_row(name, f"{was:.0%}", f"{now:.0%}")
    console.print()
    console.print(table)
    wrong_before = [i for i, attempt in enumerate(before.greedy) if not attempt.right]
    for i in wrong_before[:3]:
        console.print(f"\n{rows[i]['prompt']}{rows[i]['answer']}, likeliest solutions")
        for name, attempt in (("before", before.greedy[i]), ("after", after.greedy[i])):
            verdict = "right" if attempt.right else f"wrong: {attempt.mistake}"
            console.print(f"  {name:6s} {attempt.text}  {verdict}", markup=False)


def main(argv: list[str] | None = None) -> tuple[dict[str, float], dict[str, float]]:
    """Run the demo; returns the figures of the held-out problems before and after PPO."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24, help="PPO steps (default 24)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/demo", help="run folder (default runs/demo)")
    arguments = parser.parse_args(argv)
    for folder in (arguments.output, f"{arguments.output}-imitation"):
        if Path(folder).exists():
            parser.error(f"--output needs the folder {folder!r}, which is there already: remove it or choose a new one")
    console, start = Console(highlight=False), time.perf_counter()
    rng = random.Random(arguments.seed)
    torch.manual_seed(arguments.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    problems = make_problems(rng, HELD_OUT + TRAIN)
    held_out, train = problems[:HELD_OUT], problems[HELD_OUT:]

    console.print(
        f"A Llama of {model.num_parameters() / 1e6:.1f} M parameters imitates a pupil who adds numbers of {DIGITS} digits "
        f"and forgets {FORGETS:.0%} of his carries."
    )
    loss = imitate(model, tokenizer, [row["prompt"] for row in train], rng, f"{arguments.output}-imitation")
    console.print(
        f"Loss {loss:.2f} nats a token, {time.perf_counter() - start:.0f} s. Now PPO rewards right answers.\n"
    )

    config = PPOConfig(
        output_dir=arguments.output,
        total_steps=arguments.steps,
        seed=arguments.seed,
        rollout={"prompts_per_step": 128, "samples_per_prompt": 4, "batch_size": 256, "max_new_tokens": MAX_NEW_TOKENS},
        advantage={"gae_lambda": 1.0},
        loss={"clip_high": 0.28},
        critic={"kind": "shared", "lr": 3e-4, "value_clip": None},
        optimizer={"lr": 2e-4, "warmup_steps": 2, "schedule": "linear", "min_lr_ratio": 0.1},
        learner={"epochs": 2, "num_minibatches": 8},
        evaluation={"every": 4, "temperature": 1.0},
    )
    trainer = PPOTrainer(
        model, reward=right_answer, prompts=train, eval_prompts=held_out, config=config, tokenizer=tokenizer
    )
    before = try_held_out(trainer, held_out)
    trainer.train()
    after = try_held_out(trainer, held_out)
    show(console, held_out, before, after)
    console.print(f"\nCurve: {arguments.output}/curve.png   total {time.perf_counter() - start:.0f} s", markup=False)
    return before.figures(), after.figures()


if __name__ == "__main__":
    main()
