"""The table of docs/control.md: examples/control.py beside stable-baselines3 with the settings of its zoo, run after run in turn.

    python examples/control_table.py run CartPole-v1 [--side fastppo] [--seeds N]     adds runs to the record
    python examples/control_table.py write                                            record -> table and curves in docs/

Both sides have one thread and the same number of steps; after training each plays 100 episodes with its likeliest actions. Speed is in steps a
second of CPU time, which other processes on the machine disturb less than the clock. A run that the record holds already is not made again.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import control
import numpy as np
import stable_baselines3
import torch
from control_pictures import Panel, averaged, save_curves
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "bench" / "results" / "control.json"
EPISODES = 100
GOALS = {"CartPole-v1": 475, "Acrobot-v1": -85, "Pendulum-v1": -200, "LunarLander-v3": 200, "Hopper-v5": 2000}


def falling(start: float) -> Any:
    """The zoo's `lin_`: linearly to 0, by the share of the run that is left."""
    return lambda left: left * start


# hyperparams/ppo.yml of DLR-RM/rl-baselines3-zoo; LunarLander's are those of v2, Hopper's of v3.
ZOO: dict[str, dict[str, Any]] = {
    "CartPole-v1": {
        "n_envs": 8,
        "n_steps": 32,
        "batch_size": 256,
        "gae_lambda": 0.8,
        "gamma": 0.98,
        "n_epochs": 20,
        "learning_rate": falling(1e-3),
        "clip_range": falling(0.2),
    },
    "Acrobot-v1": {
        "normalize": True,
        "n_envs": 16,
        "n_steps": 256,
        "gae_lambda": 0.94,
        "gamma": 0.99,
        "n_epochs": 4,
    },
    "Pendulum-v1": {
        "n_envs": 4,
        "n_steps": 1024,
        "gae_lambda": 0.95,
        "gamma": 0.9,
        "n_epochs": 10,
        "learning_rate": 1e-3,
        "use_sde": True,
        "sde_sample_freq": 4,
    },
    "LunarLander-v3": {
        "n_envs": 16,
        "n_steps": 1024,
        "batch_size": 64,
        "gae_lambda": 0.98,
        "gamma": 0.999,
        "n_epochs": 4,
        "ent_coef": 0.01,
    },
    "Hopper-v5": {
        "normalize": True,
        "n_envs": 1,
        "n_steps": 512,
        "batch_size": 32,
        "gamma": 0.999,
        "learning_rate": 9.80828e-05,
        "ent_coef": 0.00229519,
        "n_epochs": 5,
        "gae_lambda": 0.99,
        "max_grad_norm": 0.7,
        "vf_coef": 0.835671,
        "policy_kwargs": {
            "log_std_init": -2,
            "ortho_init": False,
            "activation_fn": torch.nn.ReLU,
            "net_arch": {"pi": [256, 256], "vf": [256, 256]},
        },
    },
}


class Returns(BaseCallback):
    """(steps so far, return) of each episode that ends in training."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[int, float]] = []

    def _on_step(self) -> bool:
        ended = (info["episode"]["r"] for info in self.locals["infos"] if "episode" in info)
        self.kept += [(self.num_timesteps, float(x)) for x in ended]
        return True


def run_ours(env: str, seed: int, total_steps: int, algorithm: str = "ppo") -> dict[str, Any]:
    run = control.train(replace(control.TASKS[env], total_steps=total_steps, algorithm=algorithm), seed)
    found = run_record(run.policy, env, seed, run.returns, run.steps, run.seconds, run.cpu_seconds)
    return {"environments": "envpool" if control.in_envpool(env) else "Gymnasium"} | found


def run_zoo(env: str, seed: int, total_steps: int) -> dict[str, Any]:
    settings = dict(ZOO[env])
    envs, normalize = make_vec_env(env, settings.pop("n_envs"), seed=seed), settings.pop("normalize", False)
    if normalize:
        envs = VecNormalize(envs, gamma=settings["gamma"])
    model, returns = PPO("MlpPolicy", envs, seed=seed, device="cpu", **settings), Returns()
    wall, cpu = time.perf_counter(), time.process_time()
    model.learn(total_steps, callback=returns)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu

    def policy(observations: np.ndarray) -> np.ndarray:
        return model.predict(envs.normalize_obs(observations) if normalize else observations, deterministic=True)[0]

    found = run_record(policy, env, seed, returns.kept, model.num_timesteps, wall, cpu)
    return {"environments": "Gymnasium"} | found


def run_record(
    policy: control.Policy,
    env: str,
    seed: int,
    returns: list[tuple[int, float]],
    steps: int,
    seconds: float,
    cpu_seconds: float,
) -> dict[str, Any]:
    evaluation = control.evaluate(policy, env, EPISODES, seed=10_000 + seed)
    figures = {"mean_return": statistics.fmean(evaluation), "min_return": min(evaluation)}
    times = {"steps": steps, "seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2)}
    return figures | times | {"curve": averaged(returns, steps)}


SIDES = {"fastppo": run_ours, "stable-baselines3": run_zoo}
TRPO = "fastppo, TRPO"
RUNNERS = SIDES | {TRPO: partial(run_ours, algorithm="trpo")}


def read_record() -> dict[str, Any]:
    if RECORD.exists():
        return json.loads(RECORD.read_text())
    return {
        "torch": torch.__version__,
        "gymnasium": control.gym.__version__,
        "stable_baselines3": stable_baselines3.__version__,
        "envpool": version("envpool") if control.in_envpool("CartPole-v1") else None,
        "runs": [],
    }


def processor() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.processor()


def run(env: str, sides: list[str], seeds: int) -> None:
    record, total_steps = read_record(), control.TASKS[env].total_steps
    for seed in range(1, seeds + 1):
        for side in sides:
            key = {"env": env, "side": side, "seed": seed, "total_steps": total_steps}
            if any(key.items() <= found.items() for found in record["runs"]):
                continue
            record["runs"].append(key | {"machine": processor()} | RUNNERS[side](env, seed, total_steps))
            print({name: x for name, x in record["runs"][-1].items() if name != "curve"}, flush=True)
            RECORD.write_text(json.dumps(record) + "\n")


def table(record: dict[str, Any]) -> str:
    """One line a task and side: mean over the seeds of their mean returns, the worst seed's, and the median speed, also in stable-baselines3's."""
    lines = [
        "| task | goal | steps | agent | return | worst seed | seeds | environments | steps a CPU second | speed |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for env, goal in GOALS.items():
        theirs = runs_of(record, env, "stable-baselines3")
        for side in RUNNERS:
            if runs := runs_of(record, env, side):
                found = [run["mean_return"] for run in runs]
                shown = f"{statistics.fmean(found):.1f} | {min(found):.1f} | {len(runs)} | {runs[0]['environments']}"
                times = f"{speed(runs) / speed(theirs):.1f}x" if theirs else ""
                lines.append(
                    f"| {env} | {goal} | {runs[0]['total_steps']:,} | {side} | {shown} | {speed(runs):,.0f} | {times} |"
                )
            elif side in SIDES:
                lines.append(f"| {env} | {goal} | | {side} | not measured | | 0 | | | |")
    return "\n".join(lines)


def runs_of(record: dict[str, Any], env: str, side: str) -> list[dict[str, Any]]:
    return [run for run in record["runs"] if (run["env"], run["side"]) == (env, side)]


def speed(runs: list[dict[str, Any]]) -> float:
    """The median, in steps a second of CPU time."""
    return statistics.median(run["steps"] / run["cpu_seconds"] for run in runs)


def tasks_on(machine: str, record: dict[str, Any]) -> list[str]:
    return [env for env in GOALS if any((run["env"], run["machine"]) == (env, machine) for run in record["runs"])]


def write() -> None:
    """Table and curves into docs/."""
    record = read_record()
    docs = ROOT / "docs" / "control.md"
    packages = ("torch", "gymnasium", "stable_baselines3", "envpool")
    versions = ", ".join(f"{name.replace('_', '-')} {record[name]}" for name in packages if record[name])
    machines = {
        machine: tasks_on(machine, record) for machine in dict.fromkeys(run["machine"] for run in record["runs"])
    }
    where = "; ".join(f"{machine}: {', '.join(tasks)}" for machine, tasks in machines.items())
    note = f"{where}. One thread, {versions}; record: `{RECORD.relative_to(ROOT)}`."
    marked = f"<!-- control: begin -->\n{table(record)}\n\n{note}\n<!-- control: end -->"
    docs.write_text(
        re.sub(r"<!-- control: begin -->.*<!-- control: end -->", marked, docs.read_text(), flags=re.DOTALL)
    )
    panels = []
    for env, goal in GOALS.items():
        curves = {side: [run["curve"] for run in runs] for side in RUNNERS if (runs := runs_of(record, env, side))}
        if curves:
            panels.append(Panel(env, control.TASKS[env].total_steps, curves, goal))
    save_curves(panels, docs.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "write"))
    parser.add_argument("env", nargs="?", choices=list(GOALS))
    parser.add_argument("--side", choices=list(RUNNERS), help=f"default: {' and '.join(SIDES)} in turn")
    parser.add_argument("--seeds", type=int, default=5, help="the seeds 1, 2, ... (default 5 of them)")
    arguments = parser.parse_args()
    if (arguments.env is None) == (arguments.what == "run"):
        parser.error("run needs a task, write takes none")
    torch.set_num_threads(1)
    if arguments.what == "write":
        write()
    else:
        run(arguments.env, [arguments.side] if arguments.side else list(SIDES), arguments.seeds)


if __name__ == "__main__":
    main()
