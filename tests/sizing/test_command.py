"""`fastppo plan` as it is typed, and what `fastppo train` says of memory before it starts."""

from __future__ import annotations

import re

import pytest
from transformers import LlamaConfig

from fastppo import cli
from fastppo.recipe import load_recipe
from fastppo.sizing import memory_warning, warning
from tests.sizing.toys import LLAMA_8B


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder of a model of 8 billion parameters that holds a configuration and nothing else."""
    folder = tmp_path_factory.mktemp("llama")
    LlamaConfig(**LLAMA_8B, max_position_embeddings=8192).save_pretrained(folder)
    return folder


def said(capsys, *words) -> tuple[int, str]:
    code = cli.main(["plan", *map(str, words)])
    return code, capsys.readouterr().out


def test_a_run_that_fits(llama, capsys):
    code, text = said(capsys, llama, "--gpus", 8, "--gpu", "H200", "--price", 2.5, "learner.epochs=1")
    assert code == 0
    assert "8.03 G parameters in bfloat16; steps of 32 prompts of 512 tokens with 1 x 256 new ones" in text
    assert "Memory of each of 8 x h200, sharding full" in text and re.search(r"^fits: \d+", text, re.MULTILINE)
    for part in (
        "AdamW's moments",
        "policy's weights",
        "activations",
        "whole policy to sample from",
        "layers gathered",
    ):
        assert part in text, part
    shares = re.findall(r"^ *\w.* (\d+)% *$", text.split("A step's")[0], re.MULTILINE)
    assert shares[-1] == "100" and abs(sum(map(int, shares[:-1])) - 100) <= len(shares)
    for phase in ("sampling", "scoring", "update", "optimizer", "communication", "run of 100 steps"):
        assert phase in text, phase
    assert "cost of the run, 8 x 2.5 an hour" in text
    settings = text.split("Settings that fit")[1]
    assert "full" in settings and "none" not in settings


def test_a_run_that_does_not_fit_and_what_would(llama, capsys):
    code, text = said(capsys, llama, "--gpus", 2, "--gpu", "h100")
    assert code == 1
    assert "does not fit" in text and "A step's shortest time" not in text
    found = re.search(r"the cheapest change that fits: (.*) \((.*) GiB, a step of at least .*\)", text)
    assert found
    words = found[1].split()
    code, text = said(capsys, llama, "--gpu", "h100", *([] if "--gpus" in words else ["--gpus", 2]), *words)
    assert code == 0, "what is advised fits, as it is typed"


def test_a_line_for_each_number_of_gpus(llama, capsys):
    code, text = said(capsys, llama, "--gpu", "h200", "--price", 3)
    rows = re.findall(r"^ *(\d+) +(none|full) +([\d.]+) +(yes|no)(.*)$", text, re.MULTILINE)
    assert code == 0
    assert [int(row[0]) for row in rows] == [1 << power for power in range(11)]
    assert rows[0][3] == "no" and rows[-1][3] == "yes"
    memory = [float(row[2]) for row in rows[1:]]
    assert memory == sorted(memory, reverse=True), "more GPUs, less on each"


def test_a_recipe_and_its_overrides_count(llama, tmp_path, capsys):
    recipe = tmp_path / "run.yaml"
    recipe.write_text("rollout: {max_new_tokens: 100}\ndata: {max_prompt_tokens: 77}\nlora: {r: 8}\n")
    code, text = said(capsys, llama, recipe, "rollout.samples_per_prompt=4", "--gpus", 1)
    assert code == 0 and "32 prompts of 77 tokens with 4 x 100 new ones" in text
    assert "adapters" in text and "fp32 master weights" not in text
    code, text = said(capsys, llama, recipe, "--gpus", 1, "--prompt-tokens", 50)
    assert "prompts of 50 tokens" in text


def test_this_machine(stories_model, capsys):
    """The default prompt is what the context leaves."""
    code, text = said(capsys, stories_model, "--gpus", 1, "--gpu", "cpu")
    assert code == 0 and "in float32" in text and "sharding none" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0"], "--gpus is 0, expected 1 to 1024"),
        (["--gpus", "1025"], "--gpus is 1025, expected 1 to 1024"),
        (["--gpu", "h300"], "--gpu is 'h300', expected one of"),
        (["--price", "-1"], "--price is -1, expected a number above 0"),
        (["--prompt-tokens", "0"], "--prompt-tokens is 0, expected a number above 0"),
        (["--network", "nan"], "--network is nan, expected a number above 0"),
        (["--prompt-tokens", "8000"], "are 8256 together, expected at most 8192, the model's context"),
        (["nowhere.yaml"], "recipe nowhere.yaml does not exist"),
        (["learner.epoch=1"], "epoch"),
    ],
)
def test_mistakes_are_one_line(llama, words, message, capsys):
    assert cli.main(["plan", str(llama), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_model_that_is_not_there(tmp_path, capsys):
    assert cli.main(["plan", str(tmp_path / "none")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_a_run_hears_that_it_will_not_fit(llama, monkeypatch):
    recipe = load_recipe(None, [f"model.name={llama}", "device=cpu"])
    monkeypatch.setattr(warning, "free_memory", lambda: 1 << 50)
    assert memory_warning(recipe, prompt=100) is None
    monkeypatch.setattr(warning, "free_memory", lambda: 96 << 30)
    text = memory_warning(recipe, prompt=100)
    assert re.search(r"may need about \d+\.\d GiB, and 96\.0 GiB are free here; what would fit: .*lora\.r=16", text)
