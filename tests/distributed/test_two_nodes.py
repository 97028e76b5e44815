"""Two machines, each with a rank that torchrun has started, and a network between them that may be lost."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastppo import cli
from fastppo.run_folder import read_metrics, read_samples
from tests.distributed.namespaces import TwoNodes, two_nodes
from tests.distributed.ranks import run_ranks
from tests.distributed.test_shares import without_waits
from tests.distributed.test_torchrun import ROOT, write_recipe_of_ranks

TIMEOUT = 6  # seconds: distributed.timeout
SOON = 180  # seconds, of which the machine may take many for itself
PORT = 29400


def start(nodes: TwoNodes, node: int, *words: str, options: tuple[str, ...]) -> subprocess.Popen:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *options]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": nodes.DEVICE, "SLOW": "0.3"}
    command = nodes.command(node, *torchrun, "-m", "fastppo", "train", *words)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=variables, **pipes)


def wait_for_steps(run: Path, steps: int, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 400
    while not (run / "metrics.jsonl").exists() or len(read_metrics(run)) < steps:
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.2)


def on_one_node(recipe: str, run: str, steps: int) -> int:
    return cli.main(["train", recipe, f"output_dir={run}", f"total_steps={steps}"])


@pytest.mark.slow
def test_two_nodes_make_the_run_of_one_until_the_network_is_lost(tmp_path: Path) -> None:
    """Completions and metrics are those of two ranks on one node. Then nothing comes through any more, and no rank can ask another who is there:
    each ends, soon, and names the one that it has lost."""
    recipe, run, steps = write_recipe_of_ranks(tmp_path), tmp_path / "run", 2
    words = [str(recipe), f"output_dir={run}", "total_steps=10000", f"distributed.timeout={TIMEOUT}"]
    with two_nodes() as nodes:
        place = ("--master-addr", nodes.ADDRESSES[0], "--master-port", str(PORT))
        processes = [start(nodes, node, *words, options=(*place, "--node-rank", str(node))) for node in range(2)]
        try:
            wait_for_steps(run, steps, processes)
            nodes.cut()
            cut = time.monotonic()
            said = [process.communicate(timeout=SOON)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
    for node, other in ((0, 1), (1, 0)):
        assert processes[node].returncode != 0
        assert f"rank {other} of 2 did not come to:" in said[node], said[node]
        assert f"distributed.timeout = {TIMEOUT} s" in said[node]
    assert time.monotonic() - cut < SOON

    assert run_ranks(2, on_one_node, str(recipe), str(tmp_path / "one"), steps) == [0, 0]
    ours, theirs = ([without_waits(row) for row in read_metrics(tmp_path / name)[:steps]] for name in ("run", "one"))
    assert len(ours) == steps and ours == theirs
    ours, theirs = (
        [row["completion"] for row in read_samples(tmp_path / name) if row["step"] <= steps] for name in ("run", "one")
    )
    assert len(ours) > steps and ours == theirs


def test_a_rendezvous_out_of_reach_is_an_error_as_soon_as_is_asked_for(tmp_path: Path) -> None:
    """Nobody answers at the address; torchrun asks for a minute where nothing else is said."""
    with two_nodes() as nodes:
        nodes.cut()
        place = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{nodes.ADDRESSES[0]}:{PORT}")
        process = start(nodes, 1, "recipe.yaml", options=(*place, "--rdzv-conf", "is_host=0,read_timeout=3"))
        said, _ = process.communicate(timeout=SOON)
    assert process.returncode != 0 and "The connection to the C10d store has failed" in said, said
    assert f"timed out after 3000ms while trying to connect to ({nodes.ADDRESSES[0]}, {PORT})" in said, said
