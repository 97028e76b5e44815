"""A run of the bench as JSON: the machine, the versions and every row."""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import subprocess
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fastppo import native
from fastppo.bench import isa, peers
from fastppo.bench.floors import Ceilings
from fastppo.bench.harness import Row

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("fastppo", "torch", "transformers", "triton", "numpy")


@dataclass(frozen=True)
class Machine:
    """Where a record was made. `isa` and `threads` are the CPU kernels', `torch_isa` torch's; `copy_bandwidth` counts reads and writes;
    `matmul_rates` are flops a second by type."""

    device: str
    processor: str
    threads: int
    isa: str
    system: str
    cache_bytes: int
    copy_bandwidth: float
    matmul_rates: dict[str, float] = field(default_factory=dict)
    torch_isa: str | None = None


@dataclass(frozen=True)
class Record:
    machine: Machine
    versions: dict[str, str]
    revision: str | None
    date: str
    quick: bool
    rounds: int
    rows: list[Row] = field(default_factory=list)
    scaling: list[Row] = field(default_factory=list)

    def file_name(self) -> str:
        """<machine>-<date>.json, on a CPU <machine>-<threads>t-<instruction set>-<date>.json"""
        kernels = f" {self.machine.threads}t {self.machine.isa}" if self.machine.device == "cpu" else ""
        machine = re.sub(r"[^a-z0-9]+", "-", f"{self.machine.processor}{kernels}".lower()).strip("-")
        return f"{machine}-{self.date[:10]}.json"


def this_machine(device: torch.device, cache_bytes: int, ceilings: Ceilings) -> Machine:
    return Machine(
        device=device.type,
        processor=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        threads=native.threads(),
        isa=native.cpu_isa(),
        torch_isa=isa.of_torch(),
        system=f"{platform.system()} {platform.release()}",
        cache_bytes=cache_bytes,
        copy_bandwidth=ceilings.copy_bandwidth,
        matmul_rates=dict(ceilings.matmul_rates),
    )


def cpu_model() -> str:
    """The processor's name as Linux gives it, else as Python does."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def package_versions() -> dict[str, str]:
    """Of python, what the bench needs, and the installed peers."""
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, *(peer.distribution for peer in peers.installed().values())):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def git_revision() -> str | None:
    """Commit of the checkout that this module lies in, `+` after it where files differ from it; None outside of one."""
    if not (ROOT / ".git").exists():
        return None
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        status = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def save(record: Record, path: Path) -> Path:
    """Writes `record` to `path`, or into it under `record.file_name()` when it is a folder; returns the file."""
    file = path / record.file_name() if path.is_dir() else path
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"schema": SCHEMA, **asdict(record)}, indent=1, allow_nan=False) + "\n")
    temporary.replace(file)
    return file


def save_csv(record: Record, path: Path) -> Path:
    """Writes one line a row, under the fields' names, without the phases; what was not measured is empty."""
    with path.open("w", newline="") as file:
        names = [f.name for f in fields(Row) if f.name not in ("phase_s", "phase_flops")]
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(asdict(row) for row in record.rows + record.scaling)
    return path


def load(path: Path) -> Record:
    """The record in `path`; ValueError says what the file lacks."""
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{path} has schema {found!r}, expected {SCHEMA}: it is no record of this version's bench")
    del data["schema"]
    older_rate = data["machine"].pop("matmul_rate", None) if isinstance(data.get("machine"), dict) else None
    if older_rate is not None:  # of records from when only bf16 was measured
        data["machine"]["matmul_rates"] = {"bf16": older_rate}
    data["machine"] = build(Machine, data.get("machine"), f"{path}: machine")
    for group in ("rows", "scaling"):
        data[group] = [build(Row, row, f"{path}: {group}[{i}]") for i, row in enumerate(data.get(group, []))]
    return build(Record, data, str(path))


def build(cls, data: object, where: str):
    """An instance of dataclass `cls` from a dict of its fields; those with a default may be missing, as in records older than they are."""
    names = {f.name for f in fields(cls)}
    needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    found = set(data) if isinstance(data, dict) else set()
    if not isinstance(data, dict) or needed - found or found - names:
        raise ValueError(f"{where} lacks {sorted(needed - found)} and has unknown {sorted(found - names)}")
    return cls(**data)
