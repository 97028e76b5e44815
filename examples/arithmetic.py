"""PPO teaches a language model to add, from nothing, in about two minutes on a laptop CPU.

A tiny Llama (0.3 M parameters) with a character tokenizer is first shown a few worked additions, so that it knows the notation: reasoning digit by
digit inside <think>, then the answer. PPO then samples its own attempts and rewards the right answers. Run it with `make demo`, or

    python examples/arithmetic.py [--steps N] [--seed N] [--output DIR]
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
from rich.console import Console
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastppo import PPOConfig, PPOTrainer
from fastppo.model import lm_head, packed_hidden, prepare_model
from fastppo.ops import linear_token_logprobs
from fastppo.rollout import SamplingParams

DIGITS = 2
WARM_UP_STEPS = 350
WARM_UP_LR = 6e-3
HELD_OUT = 128


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character, and one for each tag."""
    tokens = ["<pad>", "<eos>", "<think>", "</think>", *"0123456789+= ,"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens(["<think>", "</think>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 3 layers and width 96, randomly initialised."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def problem(rng: random.Random) -> dict[str, str]:
    a, b = (rng.randrange(10 ** (DIGITS - 1), 10**DIGITS) for _ in range(2))
    return {"prompt": f"{a}+{b}=", "answer": str(a + b)}


def worked_solution(prompt: str) -> str:
    """The schoolbook way: digits from the right, each sum with its carry, then the answer.

    `47+85=` gives `<think>7+5=12,4+8+1=13</think>132`.
    """
    a, b = prompt.rstrip("=").split("+")
    carry, steps = 0, []
    for x, y in zip(reversed(a), reversed(b), strict=True):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}" + (f"+{carry}" if carry else "") + f"={total}")
        carry = total // 10
    return f"<think>{','.join(steps)}</think>{int(a) + int(b)}"


def right_answer(prompts: list[str], completions: list[str], answer: list[str], **_) -> list[float]:
    """The verifiable reward: 1 for exactly the right number after the reasoning, else 0."""
    return [float(text.rpartition("</think>")[2] == right) for text, right in zip(completions, answer, strict=True)]


def warm_up(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rng: random.Random, steps: int) -> float:
    """Supervised learning of the notation on worked additions; returns the last loss in nats a token."""
    prepare_model(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=WARM_UP_LR, betas=(0.9, 0.95), weight_decay=0.1)
    head = lm_head(model)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = WARM_UP_LR * min(1, (step + 1) / 20) * (1 - step / steps)
        prompts = [problem(rng)["prompt"] for _ in range(32)]
        texts = [prompt + worked_solution(prompt) for prompt in prompts]
        sequences = [torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id]) for text in texts]
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
        positions = torch.cat([torch.arange(int(length)) for length in lengths])
        tokens = torch.cat(sequences)
        hidden = packed_hidden(model, tokens, positions, cu_seqlens)
        labels = torch.where(positions.roll(-1) == 0, -100, tokens.roll(-1))  # a sequence's last token predicts nothing
        loss = -linear_token_logprobs(hidden, head.weight, labels).sum() / (labels != -100).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="PPO steps (default 40)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/demo", help="run folder (default runs/demo)")
    arguments = parser.parse_args()
    if Path(arguments.output).exists():
        parser.error(f"--output is {arguments.output!r}, which is there already: remove it or choose a new folder")
    console, start = Console(highlight=False), time.perf_counter()
    rng = random.Random(arguments.seed)
    torch.manual_seed(arguments.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    held_out = [problem(rng) for _ in range(HELD_OUT)]
    train = [problem(rng) for _ in range(4096)]

    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"A Llama of {parameters / 1e6:.1f} M parameters learns {DIGITS}-digit addition.\n")
    loss = warm_up(model, tokenizer, rng, WARM_UP_STEPS)
    console.print(
        f"Warm-up on worked examples: loss {loss:.2f} nats a token, {time.perf_counter() - start:.0f} s. Now PPO.\n"
    )

    config = PPOConfig(
        output_dir=arguments.output,
        total_steps=arguments.steps,
        seed=arguments.seed,
        rollout={"prompts_per_step": 128, "samples_per_prompt": 4, "batch_size": 256, "max_new_tokens": 32},
        advantage={"gae_lambda": 1.0},
        loss={"clip_high": 0.28},
        critic={"lr": 1e-3, "value_clip": None},
        optimizer={"lr": 3e-4, "warmup_steps": 3, "schedule": "linear", "min_lr_ratio": 0.3},
        learner={"epochs": 2, "num_minibatches": 8},
        evaluation={"every": 10},
    )
    trainer = PPOTrainer(
        model, reward=right_answer, prompts=train, eval_prompts=held_out, config=config, tokenizer=tokenizer
    )
    before, sampled_before = attempts(trainer, held_out), solved(attempts(trainer, held_out, samples=4))
    trainer.train()
    after, sampled_after = attempts(trainer, held_out), solved(attempts(trainer, held_out, samples=4))
    console.print(
        f"\nHeld-out problems solved, sampled as in training: {sampled_before:.0%} before PPO, {sampled_after:.0%} after. "
        f"Always the likeliest token: {solved(before):.0%}, {solved(after):.0%}. Some that were wrong before:"
    )
    wrong_before = [i for i, (_, right) in enumerate(before) if not right]
    for i in wrong_before[:3]:
        console.print(f"\n{held_out[i]['prompt']}{held_out[i]['answer']}")
        for name, (text, right) in (("before", before[i]), ("after", after[i])):
            console.print(f"  {name:6s} {'right' if right else 'wrong'}  {text}", markup=False)
    console.print(f"\nCurve: {arguments.output}/curve.png   total {time.perf_counter() - start:.0f} s", markup=False)


def attempts(trainer: PPOTrainer, rows: list[dict[str, str]], samples: int = 0) -> list[tuple[str, bool]]:
    """Completions of some problems and whether each is right: `samples` of each, or the greedy one."""
    prompts = [trainer.tokenizer(row["prompt"])["input_ids"] for row in rows]
    sampling = SamplingParams(n=max(samples, 1), temperature=float(samples > 0), max_new_tokens=32)
    rollout = trainer.engine.generate(prompts, sampling)
    texts = trainer.tokenizer.batch_decode(rollout.completions(), skip_special_tokens=True)
    scores = right_answer([], texts, [rows[i]["answer"] for i in rollout.prompt_index.tolist()])
    return [(text, score == 1) for text, score in zip(texts, scores, strict=True)]


def solved(results: list[tuple[str, bool]]) -> float:
    return sum(right for _, right in results) / len(results)


if __name__ == "__main__":
    main()
