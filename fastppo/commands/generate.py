"""`fastppo generate`: sample from a model, streaming to the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TextStreamer

from fastppo.commands import search
from fastppo.console import printable
from fastppo.model import load_model, load_tokenizer
from fastppo.model.decoding import decodable, decode
from fastppo.rollout import Engine, SamplingParams


def run(options: argparse.Namespace) -> int:
    search.check(options)
    sampling = SamplingParams(
        n=options.n,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        max_new_tokens=options.max_new_tokens,
        stop_strings=tuple(options.stop),
        seed=options.seed,
    )
    prompts = options.prompt or [_piped()]
    tokenizer = load_tokenizer(options.model, "model")
    if options.chat:
        prompts = [_as_message(tokenizer, text) for text in prompts]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    engine = Engine(load_model(options.model, dtype=options.dtype, device=device), tokenizer)
    if options.search is not None:
        return search.run(options, engine, prompts, sampling)
    if len(prompts) * options.n == 1:
        streamer = _streamer(tokenizer)

        def show(new: list[tuple[int, int]]) -> None:
            for token in decodable(tokenizer, [token for _, token in new]):
                streamer.put(torch.tensor([token], dtype=torch.int64, device="cpu"))

        engine.generate(prompts, sampling, on_tokens=show)
        streamer.end()
    else:
        with _rollout_bar(engine) as progress:
            rollout = engine.generate(prompts, sampling, progress=progress)
        texts = [decode(tokenizer, ids, skip_special_tokens=True) for ids in rollout.completions()]
        for index, text in zip(rollout.prompt_index.tolist(), texts, strict=True):
            print(f"--- prompt {index}\n{printable(text)}")
    stats = engine.stats
    print(
        f"prompt {stats.prefill_tokens} tokens, {stats.prefill_tokens_per_second:,.0f} a second; "
        f"new {stats.decode_tokens_per_second:,.0f} a second, {stats.decode_bytes_per_second / 1e9:.1f} GB/s",
        file=sys.stderr,
    )
    return 0


def _piped() -> str:
    """What stands on standard input; "" where that is closed."""
    try:
        return sys.stdin.read() if sys.stdin else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is no text in {error.encoding}, expected the prompt: {error}") from error


def _streamer(tokenizer) -> TextStreamer:
    """Prints completions as they grow, without what could drive the terminal."""

    class Printer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(printable(text), stream_end)

    return Printer(tokenizer, skip_special_tokens=True)


@contextmanager
def _rollout_bar(engine: Engine) -> Iterator[Callable[[int, int], None]]:
    """A bar of finished sequences and new tokens a second on a terminal's standard error; nothing elsewhere."""
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(
            task, completed=done, total=total, description=f"{engine.stats.tokens_per_second:,.0f} tok/s"
        )


def _as_message(tokenizer, text: str) -> list[int]:
    if tokenizer.chat_template is None:
        raise ValueError("--chat: this model's tokenizer has no chat template")
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
