"""Whole runs of TRL's trainers, patched and not: the same curves but for rounding, and every metric that TRL logs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastppo.integrations import trl as ours
from tests.tiny import LETTERS, make_model, make_tokenizer
from tests.tolerance import assert_as_exact_as_model

pytest.importorskip("trl", reason="TRL is not installed")
TRL_1_8 = Path(sys.prefix) / "trl-1.8"
TIMES = ("runtime", "per_second", "step_time", "epoch")


@pytest.fixture(autouse=True)
def _one_draw_for_all_types(monkeypatch: pytest.MonkeyPatch):
    """A model in fp64 samples what it does in fp32: torch.multinomial's random numbers depend on the type."""

    def inverse(probabilities: Tensor, num_samples: int) -> Tensor:
        uniform = torch.rand(len(probabilities), num_samples, dtype=torch.float64)
        return torch.searchsorted(probabilities.double().cumsum(-1), uniform).clamp(max=probabilities.shape[-1] - 1)

    monkeypatch.setattr(torch, "multinomial", inverse)


def run(trainer: str, folder: Path, dtype: torch.dtype, **settings) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Three steps of GRPO or RLOO on the CPU: (metric -> its curve, the weights)."""
    import trl
    from datasets import Dataset

    make_model(tie_word_embeddings=True).to(dtype).save_pretrained(folder / "model")
    data = Dataset.from_dict({"prompt": [LETTERS[i : i + 2 + i % 3] for i in range(8)]})
    settings = {
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 6,
        "beta": 0.1,
    } | settings
    settings |= {"max_steps": 3, "learning_rate": 0.05, "optim": "sgd", "logging_steps": 1, "bf16": False, "seed": 1}
    settings |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    settings |= {"gradient_checkpointing": False, "model_init_kwargs": {"dtype": "auto"}}
    made = getattr(trl, f"{trainer}Trainer")(
        model=str(folder / "model"),
        reward_funcs=lambda completion_ids, **_: [float(sum(ids) % 5) for ids in completion_ids],
        args=getattr(trl, f"{trainer}Config")(output_dir=str(folder), **settings),
        train_dataset=data,
        processing_class=make_tokenizer(),
    )
    made.train()
    return curves(made.state.log_history), {name: x.detach() for name, x in made.model.named_parameters()}


def curves(history: list[dict]) -> dict[str, Tensor]:
    names = {name for row in history for name in row if not any(part in name for part in TIMES)}
    return {name: torch.tensor([float(row[name]) for row in history if name in row]) for name in sorted(names)}


def assert_same_runs(train: Callable[[torch.dtype], tuple[dict[str, Tensor], dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Unpatched in fp32 and fp64, patched in fp32: ours are as close to the fp64 run as TRL's own are. Returns our curves."""
    exact, native = train(torch.float64), train(torch.float32)
    with ours.patch():
        mine = train(torch.float32)
    for our, their, true in zip(mine, native, exact, strict=True):
        assert our.keys() == their.keys() == true.keys()
        for name in our:
            assert_as_exact_as_model(our[name], their[name], true[name].double(), name)
    return mine[0]


@pytest.mark.parametrize(
    "trainer, settings",
    [
        ("GRPO", {"loss_type": "dapo", "num_iterations": 2}),
        ("GRPO", {"loss_type": "grpo", "entropy_coef": 0.1, "steps_per_generation": 2}),
        ("GRPO", {"loss_type": "bnpo", "top_entropy_quantile": 0.5, "importance_sampling_level": "sequence"}),
        ("RLOO", {"num_iterations": 2, "beta": 0.0}),  # its KL is a difference of sums, all rounding at first
    ],
)
def test_curves_and_weights_of_a_run(trainer: str, settings: dict, tmp_path: Path):
    """Old and reference log-probabilities, gradient accumulation, an entropy with a gradient."""
    metrics = assert_same_runs(lambda dtype: run(trainer, tmp_path, dtype, **settings))
    assert {"loss", "entropy", "clip_ratio/low_mean"} <= metrics.keys()
    assert metrics["loss"].abs().max() > 0


def test_a_run_uses_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The trainer's own module sees the patch: its head calls our op, on rows that have a label alone."""
    from fastppo import ops

    rows = []
    op = ops.linear_token_logprobs

    def counted(hidden: Tensor, *args, **options):
        rows.append(len(hidden))
        return op(hidden, *args, **options)

    monkeypatch.setattr(ops, "linear_token_logprobs", counted)
    with ours.patch():
        run("GRPO", tmp_path, torch.float32)
    assert rows and max(rows) <= 4 * 6


def test_trl_1_8():
    """The last TRL with a PPO trainer, in a process that finds it before the installed one."""
    if not TRL_1_8.is_dir():
        pytest.skip(f"no TRL 1.8 in {TRL_1_8}")
    tests = Path(__file__).with_name("trl_1_8.py")
    environment = {**os.environ, "PYTHONPATH": str(TRL_1_8), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", str(tests)]
    done = subprocess.run(command, cwd=tests.parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
