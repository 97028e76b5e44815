"""`fastppo info`: versions, devices and backends here, or the facts of a model."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from fastppo import native
from fastppo.console import printable
from fastppo.integrations import PATCHED
from fastppo.model import context_length, ending_ids, load_outline, load_tokenizer
from fastppo.model.decoding import token_text
from fastppo.model.exact import why_not_on_gpu
from fastppo.model.parts import why_not_parts
from fastppo.ops._backends import OpStatus, describe

EXTRAS = {
    "data": "datasets",
    "math": "math_verify",
    "bleu": "sacrebleu",
    "json-schema": "jsonschema",
    "reasoning-gym": "reasoning_gym",
    "reward-model": "trl",
    "lora": "peft",
    "gymnasium": "gymnasium",
    "textarena": "textarena",
    "openenv": "openenv",
    "verifiers": "verifiers",
    "mcp": "mcp",
    "serve": "uvicorn",
    "plot": "matplotlib",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
    "mlflow": "mlflow",
    "ray": "ray",
    "flash-attn": "flash_attn",
}
NOT_INSTALLED = "not installed"


def _info_model(name: str) -> int:
    """From its configurations and tokenizer alone: the weights are not read."""
    model, tokenizer = load_outline(name), load_tokenizer(name, "model")
    facts = Table(box=None, show_header=False)
    facts.add_row("architecture", type(model).__name__)
    facts.add_row("parameters", f"{model.num_parameters():,}")
    facts.add_row("context", f"{context_length(model) or 'no limit'}")
    reason = why_not_parts(model)
    facts.add_row(
        "layers", "built as Llama's: our kernels run them" if reason is None else f"its own modules run: {reason}"
    )
    facts.add_row("same bits sampled and trained", _where_exact(model) if reason is None else "nowhere")
    facts.add_row("chat template", "yes" if getattr(tokenizer, "chat_template", None) else "no")
    for token, places in ending_ids(model, tokenizer).items() or {None: []}.items():
        text = "nothing" if token is None else f"{token_text(tokenizer, token)} ({token}): {', '.join(places)}"
        facts.add_row("ends with", Text(printable(text)))
    Console(highlight=False, soft_wrap=True).print(facts)
    return 0


def _where_exact(model: PreTrainedModel) -> str:
    """Of a model that is built as Llama is."""
    reason = why_not_on_gpu(model)
    on_gpu = "on a GPU with rollout.exact=true" if reason is None else f"not on a GPU: {reason}"
    return f"on a CPU in float32; {on_gpu}"


def run(options: argparse.Namespace) -> int:
    if options.model is not None:
        return _info_model(options.model)
    console = Console(highlight=False, soft_wrap=True)
    facts = Table(box=None, show_header=False)
    for package in ("fastppo", "torch", "triton", "transformers", "numpy"):
        facts.add_row(package, _version(package))
    facts.add_row("python", platform.python_version())
    facts.add_row(
        "CPU kernels", native.unavailable_reason or f"built, {native.cpu_isa()}, {torch.get_num_threads()} threads"
    )
    facts.add_row("CUDA kernels", native.cuda_unavailable_reason() or "built")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts.add_row("GPUs", ", ".join(gpus) or "none")
    installed = [name for name, module in EXTRAS.items() if find_spec(module)]
    facts.add_row("extras", ", ".join(installed) or "none")
    missing = [name for name in EXTRAS if name not in installed]
    facts.add_row("not installed", ", ".join(missing) or "none")
    peers = [f"{name} {found}" for name in PATCHED.values() if (found := _version(name)) != NOT_INSTALLED]
    facts.add_row("drop-in for", ", ".join(peers) or "none that is installed")
    console.print(facts)
    table = Table("op", "on CPU tensors", "on CUDA tensors", title="\nKernels", title_justify="left", box=None)
    for on_cpu, on_cuda in zip(describe("cpu"), describe("cuda"), strict=True):
        table.add_row(on_cpu.op, _backend(on_cpu), _backend(on_cuda))
    console.print(table)
    return 0


def _backend(status: OpStatus) -> str:
    """Its name, and where plain PyTorch serves the reasons too."""
    return status.backend if status.backend != "reference" else f"reference ({'; '.join(status.reasons.values())})"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return NOT_INSTALLED
