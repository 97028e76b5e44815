"""`fastppo serve`, as it is typed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from urllib.error import HTTPError

import pytest

from fastppo import cli
from fastppo.commands.serve import policy_of
from tests.envs.chat import make_chat_tokenizer
from tests.serve.client import ask, error_of, said
from tests.tiny import make_model, make_tokenizer

pytest.importorskip("starlette", reason="starlette is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_chat_tokenizer()
    for part in (make_model(vocab_size=len(tokenizer), max_position_embeddings=512), tokenizer):
        part.save_pretrained(folder)
    return folder


def test_it_serves_until_it_is_ended(model):
    command = [sys.executable, "-m", "fastppo", "serve", str(model), "--port", "0"]
    variables = os.environ | {"FASTPPO_API_KEY": "secret", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables)
    try:
        line = server.stdout.readline()
        assert line.startswith(f"{model} is served at http://127.0.0.1:"), line
        base_url = line.split(" is served at ")[1].split()[0]
        answer = ask(base_url, "secret", "hi", model=str(model), seed=1, max_tokens=5)
        assert said(answer)["role"] == "assistant" and answer["usage"]["completion_tokens"] <= 5
        with pytest.raises(HTTPError) as refused:
            ask(base_url, "another", "hi", model=str(model))
        assert refused.value.code == 401 and error_of(refused.value)["code"] == "invalid_api_key"
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 143 and server.stdout.read() == ""
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_beyond_this_machine_it_wants_a_key(model, host, monkeypatch, capsys):
    monkeypatch.delenv("FASTPPO_API_KEY", raising=False)
    assert cli.main(["serve", str(model), "--host", host]) == 2
    assert f"--host is {host}, which other machines can reach: set FASTPPO_API_KEY" in capsys.readouterr().err


def test_what_it_cannot_serve(model, tmp_path, capsys):
    def error(*arguments):
        assert cli.main(["serve", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    make_tokenizer().save_pretrained(tmp_path / "plain")
    make_model().save_pretrained(tmp_path / "plain")
    assert "has no chat template, expected one: it is served messages" in error(tmp_path / "plain")
    run = tmp_path / "a run"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 1")
    assert f"is a run that has not written its model yet: fastppo export '{run}'" in error(run)
    assert "seed=1 is given with" in error(model, "seed=1")
    assert "--host is 'no.such.host.invalid', expected a name or an address" in error(
        model, "--host", "no.such.host.invalid"
    )
    assert "--port is 65536, expected 0 to 65535" in error(model, "--port", "65536")


def test_whose_model_a_recipe_names(model, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"output_dir": str(tmp_path / "run"), "model": {"name": str(model)}, "seed": 4}))
    policy = policy_of(str(recipe), ["rollout.temperature=0.5"])
    assert policy.model == str(model) and (policy.sampling.temperature, policy.sampling.seed) == (0.5, 4)
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    assert policy_of(str(recipe), []).model == policy_of(str(recipe), []).tokenizer == str(tmp_path / "run" / "model")
