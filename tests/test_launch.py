"""examples/launch: scripts that a shell takes, words that torchrun takes, settings and recipes that are there."""

from __future__ import annotations

import os
import py_compile
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from fastppo import cli
from fastppo.recipe import load_recipe
from fastppo.run_folder import read_metrics

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "examples" / "launch"
SCRIPTS = ("one_node.sh", "several_nodes.sh", "slurm.sbatch")
ENVIRONMENT = {
    "one_node.sh": {"GPUS": "4"},
    "several_nodes.sh": {"NODES": "3", "HEAD": "node0:29500", "GPUS": "8"},
    "slurm.sbatch": {
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_RESTART_COUNT": "1",
    },
}
# What the scripts call, in place of what it stands for: it writes down its words, one a line.
STAND_INS = {
    "torchrun": 'printf "%s\\n" "$@" > "$WORDS"\n',
    "srun": '[ "$1" = --kill-on-bad-exit=1 ] && shift && exec "$@"\n',
    "scontrol": '[ "$1 $2 $3" = "show hostnames node[0-1]" ] && printf "node0\\nnode1\\n"\n',
}


@pytest.fixture
def started(tmp_path):
    """started(script, *words) -> (exit code, what it writes to standard error, the words that torchrun is called with)"""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in STAND_INS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (folder / name).chmod(0o755)

    def start(script: str, *words: str, **environment: str) -> tuple[int, str, list[str]]:
        said = tmp_path / "words"
        said.unlink(missing_ok=True)
        path = f"{folder}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", LAUNCH / script, *words],
            env={"PATH": path, "WORDS": str(said), **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stderr, said.read_text().splitlines() if said.exists() else []

    return start


def fastppo_words(torchrun: list[str]) -> tuple[object, list[str]]:
    """(torchrun's options, what comes after `-m fastppo`), as torchrun's own parser reads them."""
    options = get_args_parser().parse_args(torchrun)
    assert options.module and options.training_script == "fastppo"
    return options, options.training_script_args


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_shell_takes_the_script(script):
    done = subprocess.run(["bash", "-n", LAUNCH / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_torchrun_is_called_as_it_wants_to_be(script, started):
    code, error, words = started(script, "recipes/gsm8k.yaml", "output_dir=/shared/a b", **ENVIRONMENT[script])
    assert code == 0, error
    options, rest = fastppo_words(words)
    assert rest[:3] == ["train", "recipes/gsm8k.yaml", "output_dir=/shared/a b"]
    assert options.max_restarts == 3
    if script == "one_node.sh":
        assert options.standalone and options.nproc_per_node == "4"
        return
    assert options.nnodes == {"several_nodes.sh": "3", "slurm.sbatch": "2"}[script] and options.nproc_per_node == "8"
    assert options.rdzv_backend == "c10d"
    assert options.rdzv_endpoint == {"several_nodes.sh": "node0:29500", "slurm.sbatch": "node0:24711"}[script]
    assert rest[3:] == (["--resume"] if script == "slurm.sbatch" else [])


def test_what_is_missing_is_named(started):
    code, error, words = started("several_nodes.sh", "recipes/gsm8k.yaml", HEAD="node0:29500")
    assert code != 0 and "NODES" in error and "number of machines" in error and not words


def test_a_job_that_is_new_does_not_resume(started):
    _, _, words = started("slurm.sbatch", "r.yaml", **ENVIRONMENT["slurm.sbatch"] | {"SLURM_RESTART_COUNT": "0"})
    assert words[-1] == "r.yaml"


def test_the_comments_show_words_that_work():
    """What each file's head tells to type: the script, and a recipe of this repository with settings that it has."""
    for path in (*(LAUNCH / name for name in SCRIPTS), LAUNCH / "ray_train.py"):
        lines = [line for line in path.read_text().splitlines() if "recipes/" in line]
        line = next(line for line in lines if path.name in line)
        words = shlex.split(line[line.index("examples/launch/") :].replace("[key=value ...]", "").rstrip("`"))
        assert ROOT / words[0] == path
        recipe, *overrides = words[next(place for place, word in enumerate(words) if word.startswith("recipes/")) :]
        load_recipe(ROOT / recipe, overrides)


def test_the_job_for_kubernetes():
    """What the operator's definition asks for, and a command that torchrun takes."""
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob") and job["metadata"]["name"]
    spec = job["spec"]
    assert spec.keys() <= {"nprocPerNode", "elasticPolicy", "pytorchReplicaSpecs", "runPolicy"}
    assert isinstance(spec["nprocPerNode"], str), "a number would be refused"
    policy = spec["elasticPolicy"]
    assert policy.keys() <= {
        "rdzvBackend",
        "rdzvHost",
        "rdzvPort",
        "rdzvId",
        "minReplicas",
        "maxReplicas",
        "maxRestarts",
    }
    (worker,) = spec["pytorchReplicaSpecs"].values()
    assert policy["minReplicas"] <= worker["replicas"] <= policy["maxReplicas"]
    assert worker["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch", "the operator looks for this name"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(spec["nprocPerNode"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    torchrun, *words = container["command"]
    assert torchrun == "torchrun"
    _, (command, recipe, *overrides) = fastppo_words(words)
    assert command == "train"
    load_recipe(ROOT / Path(recipe).relative_to("/shared"), overrides)


def test_the_program_for_ray_compiles(tmp_path):
    py_compile.compile(str(LAUNCH / "ray_train.py"), cfile=str(tmp_path / "ray_train.pyc"), doraise=True)


@pytest.mark.slow
def test_ray_starts_the_ranks(tmp_path, stories_model):
    """Two workers of a Ray of this machine make one run."""
    pytest.importorskip("ray", reason="pip install 'fastppo[ray]'")
    pytest.importorskip("pyarrow", reason="pip install 'fastppo[ray]'")
    settings = [
        f"model.name={stories_model}", f"output_dir={tmp_path / 'run'}", "device=cpu", "total_steps=1",
        "rollout.prompts_per_step=4", "rollout.max_new_tokens=8", "data.eval_size=0",
    ]  # fmt: skip
    program = [sys.executable, LAUNCH / "ray_train.py", "--cpu", "--workers", "2", ROOT / "recipes" / "stories.yaml"]
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    quiet["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "600"  # workers that import while other tests run
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # sockets lie there, whose paths may have 107 bytes
        quiet["RAY_TMPDIR"] = short
        done = subprocess.run(
            [*map(str, program), *settings], env=os.environ | quiet, capture_output=True, text=True, timeout=1200
        )
    assert done.returncode == 0, done.stderr[-3000:]
    (record,) = read_metrics(tmp_path / "run")
    assert record["step"] == 1
    assert cli.main(["info", str(tmp_path / "run" / "model")]) == 0
