"""Installing where there is no compiler leaves a package that works, slower, and says so once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# An editable install would find its own fastppo._C for the package that has none.
USE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
import warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastppo
    for _ in range(2):
        out = fastppo.token_logprobs(torch.zeros(2, 4), torch.tensor([0, 3]))
assert torch.equal(out, torch.zeros(2, 4).log_softmax(-1)[:, 0]), out
ours = [str(w.message) for w in caught if "fastppo" in str(w.message)]
assert len(ours) == 1 and "C++ kernels are not built" in ours[0], ours
print(fastppo.__file__)
"""


@pytest.mark.slow
def test_without_a_compiler_the_reference_serves(tmp_path):
    sources = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(sources)], check=True) if (ROOT / ".git").exists() else None
    if not sources.exists():
        pytest.skip("needs a git checkout")
    target = tmp_path / "site"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-build-isolation",
        "--no-deps",
        "--target",
        str(target),
        "-v",
    ]
    environment = os.environ | {"CXX": "/bin/false", "NVCC": "/bin/false"}
    environment.pop("FASTPPO_CUDA", None)
    done = subprocess.run([*pip, str(sources)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for kind in ("CUDA", "C++"):
        assert f"fastppo's {kind} kernels were not built" in done.stdout + done.stderr
    used = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
    )
    assert used.returncode == 0, used.stderr
    assert str(target) in used.stdout


def test_a_wrong_cuda_setting_is_refused():
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", "/tmp/fastppo-unused", "--build-lib", "/tmp/fastppo-unused"],
        cwd=ROOT, env=os.environ | {"FASTPPO_CUDA": "yes"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0 and "FASTPPO_CUDA is 'yes', expected 0 or 1" in done.stderr
