"""Three short runs that were recorded once: the same seeds give the same weights and the same curve, whatever is rebuilt around them.

`recorded_runs.json` holds metrics and weights by the bits that PyTorch's own products have on a machine (one record: a processor with AVX2).
Where a machine gives these, everything must be equal to the bit; elsewhere the first step must be near.
A change that is meant to alter what is computed records anew (`python -m tests.trainer.test_recorded_runs FILE`) and says why.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastppo import PPOConfig, PPOTrainer
from fastppo.console import Reporter
from fastppo.model import lm_head, packed_hidden, prepare_model
from fastppo.ops import linear_token_logprobs
from fastppo.rewards import happy_ending
from fastppo.run_folder import read_metrics
from tests.tiny import make_model, make_tokenizer

RECORD = Path(__file__).with_name("recorded_runs.json")
PROMPTS = Path(__file__).resolve().parents[2] / "recipes" / "data" / "stories_prompts.jsonl"
NOT_COMPARED = ("time/", "perf/", "rollout/occupancy", "rollout/shared")
NEAR = 0.02  # of a metric's size: a token here and there is drawn differently


def fingerprint() -> str:
    """What PyTorch's products, attention and functions give here, as a hash of their bits."""
    generator = torch.Generator().manual_seed(0)
    x, w, q = (torch.randn(s, generator=generator).requires_grad_() for s in ((200, 96), (256, 96), (2, 4, 37, 24)))
    y = F.silu(F.linear(x, w)).softmax(-1).pow(2).mean()
    y = y + F.scaled_dot_product_attention(q, q, q, is_causal=True).exp().sum() + torch.rsqrt(x.pow(2).mean(-1)).sum()
    y.backward()
    return digest([y, x.grad, w.grad, q.grad])


def digest(tensors: list[torch.Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def run(folder: Path, config: dict, **arguments) -> dict:
    """{"metrics": rows, "weights": hash of policy and critic}"""
    config = PPOConfig(output_dir=str(folder), device="cpu", total_steps=3, **config)
    trainer = PPOTrainer(config=config, reporter=Reporter(config.total_steps, quiet=True), **arguments)
    trainer.train()
    rows = [
        {name: value for name, value in row.items() if not name.startswith(NOT_COMPARED)}
        for row in read_metrics(folder)
    ]
    weights = hashlib.sha256()
    for module in trainer.roles.trained().values():
        for name, tensor in module.state_dict().items():
            weights.update(name.encode())
            weights.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return {"metrics": rows, "weights": weights.hexdigest()}


# Addition: a tiny Llama that has seen worked examples for a moment, as in the demo.


def arithmetic_tokenizer() -> PreTrainedTokenizerFast:
    tokens = ["<pad>", "<eos>", "<think>", "</think>", *"0123456789+= ,"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens(["<think>", "</think>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def problem(rng: random.Random) -> dict[str, str]:
    a, b = (rng.randrange(10, 100) for _ in range(2))
    return {"prompt": f"{a}+{b}=", "answer": str(a + b)}


def worked_solution(prompt: str) -> str:
    a, b = prompt.rstrip("=").split("+")
    carry, steps = 0, []
    for x, y in zip(reversed(a), reversed(b), strict=True):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}" + (f"+{carry}" if carry else "") + f"={total}")
        carry = total // 10
    return f"<think>{','.join(steps)}</think>{int(a) + int(b)}"


def right_answer(prompts, completions, answer, **_):
    return [float(text.rpartition("</think>")[2] == right) for text, right in zip(completions, answer, strict=True)]


def warm_up(model, tokenizer, rng: random.Random, steps: int) -> None:
    prepare_model(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 6e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        prompts = [problem(rng)["prompt"] for _ in range(32)]
        texts = [prompt + worked_solution(prompt) for prompt in prompts]
        sequences = [torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id]) for text in texts]
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
        positions = torch.cat([torch.arange(int(length)) for length in lengths])
        tokens = torch.cat(sequences)
        hidden = packed_hidden(model, tokens, positions, cu_seqlens)
        labels = torch.where(positions.roll(-1) == 0, -100, tokens.roll(-1))
        loss = -linear_token_logprobs(hidden, lm_head(model).weight, labels).sum() / (labels != -100).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def arithmetic(folder: Path) -> dict:
    rng, tokenizer = random.Random(0), arithmetic_tokenizer()
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    config = LlamaConfig(
        vocab_size=len(tokenizer), **sizes, **ids, max_position_embeddings=96, tie_word_embeddings=True
    )
    model = LlamaForCausalLM(config)
    held_out, train = ([problem(rng) for _ in range(count)] for count in (32, 512))
    warm_up(model, tokenizer, rng, 60)
    settings = {
        "rollout": {"prompts_per_step": 32, "samples_per_prompt": 4, "batch_size": 64, "max_new_tokens": 32},
        "reward": {"timeout": None},
        "advantage": {"gae_lambda": 1.0},
        "loss": {"clip_high": 0.28},
        "critic": {"lr": 1e-3, "value_clip": None},
        "optimizer": {"lr": 3e-4, "warmup_steps": 3, "schedule": "linear", "min_lr_ratio": 0.3},
        "learner": {"epochs": 2, "num_minibatches": 8},
    }
    data = {"prompts": train, "eval_prompts": held_out}
    return run(folder, settings, model=model, tokenizer=tokenizer, reward=right_answer, **data)


def stories(folder: Path, model: Path) -> dict:
    """The recipe of that name, on less."""
    rows = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    settings = {
        "rollout": {
            "prompts_per_step": 16,
            "samples_per_prompt": 2,
            "batch_size": 32,
            "max_new_tokens": 48,
            "stop_token_ids": (1,),
        },
        "reward": {"timeout": None, "kl_coef": 0.01},
        "critic": {"lr": 1e-3},
        "optimizer": {"lr": 5e-4, "warmup_steps": 5, "schedule": "cosine", "min_lr_ratio": 0.1},
        "evaluation": {"temperature": 1.0},
    }
    data = {"prompts": rows[:64], "eval_prompts": rows[64:80]}
    return run(folder, settings, model=str(model), reward=happy_ending, **data)


def letters(prompts, completions, **_):
    return [text.count("a") / max(1, len(text)) for text in completions]


def variants(folder: Path) -> dict:
    """What the other two leave out: a shared trunk, whitened rewards, bootstrapping, dual clip, entropy, filters, small micro-batches."""
    prompts = ["ab", "cde", "f", "ghijk", "lm", "nop", "ba", "dc"]
    settings = {
        "rollout": {
            "prompts_per_step": 8,
            "samples_per_prompt": 3,
            "max_new_tokens": 9,
            "min_new_tokens": 2,
            "temperature": 0.8,
            "top_k": 12,
        },
        "reward": {"timeout": None, "kl_coef": 0.05, "kl_estimator": "k3", "whiten": True, "missing_eos_penalty": 0.5},
        "advantage": {"gamma": 0.99, "bootstrap_truncated": True},
        "loss": {"dual_clip": 3.0, "entropy_coef": 0.01, "aggregation": "seq-mean-token-mean"},
        "critic": {"kind": "shared", "lr": 1e-3},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.1},
        "learner": {"num_minibatches": 3, "tokens_per_microbatch": 40},
    }
    return run(folder, settings, model=make_model(), tokenizer=make_tokenizer(), reward=letters, prompts=prompts)


def assert_as_recorded(name: str, found: dict) -> None:
    records = json.loads(RECORD.read_text())
    here = fingerprint()
    if here in records:
        expected = records[here]["runs"][name]
        assert found["metrics"] == expected["metrics"]
        assert found["weights"] == expected["weights"]
        return
    expected = next(iter(records.values()))["runs"][name]["metrics"]
    first = next(row for row in expected if row["step"] == 1)
    near = next(row for row in found["metrics"] if row["step"] == 1)
    assert first.keys() == near.keys()
    far = {
        key: (near[key], value) for key, value in first.items() if abs(near[key] - value) > NEAR * max(1, abs(value))
    }
    assert not far


def test_addition(tmp_path):
    assert_as_recorded("arithmetic", arithmetic(tmp_path / "run"))


def test_stories(tmp_path, stories_model):
    assert_as_recorded("stories", stories(tmp_path / "run", stories_model))


def test_variants(tmp_path):
    assert_as_recorded("variants", variants(tmp_path / "run"))


@pytest.mark.parametrize("name", ["arithmetic", "stories", "variants"])
def test_the_records_differ_by_machine_alone(name):
    """Machines' records tell the same story, so that one could not stand in for a broken other."""
    one, *others = (record["runs"][name]["metrics"] for record in json.loads(RECORD.read_text()).values())
    for other in others:
        assert [row.keys() for row in one] == [row.keys() for row in other]


if __name__ == "__main__":  # FILE, and the stories model's folder: adds this machine's record to FILE
    torch.set_num_threads(1)
    path, model = Path(sys.argv[1]), Path(sys.argv[2])
    records = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        made = {"arithmetic": arithmetic(Path(folder) / "a"), "stories": stories(Path(folder) / "s", model)}
        made["variants"] = variants(Path(folder) / "v")
    records[fingerprint()] = {"runs": made}
    path.write_text(json.dumps(records, indent=1))
