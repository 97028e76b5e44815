"""Numbers that Python and csrc/ keep both: a table that differs is found at import, not in a wrong loss."""

from __future__ import annotations

import pytest

from fastppo import native
from fastppo.native import approx_kl, decode_attention, ppo_loss
from fastppo.ops import PPOStats

TABLES = {
    "DTYPE_CODES": {"float32": 0, "bfloat16": 1, "float16": 2},
    "KL_KINDS": native.codes(approx_kl.KL_KINDS),
    "ROLLOUT_CORRECTIONS": native.codes(ppo_loss.ROLLOUT_CORRECTIONS),
    "PPO_COLUMNS": native.codes(ppo_loss.PPO_COLUMNS),
    "PPO_SUMS": native.codes(ppo_loss.PPO_SUMS),
    "PPO_NUMBERS": native.codes(ppo_loss.PPONumbers._fields),
    "MAX_HEAD_SIZE": decode_attention.MAX_HEAD_SIZE,
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_of_the_extension(cpu_backend, name, monkeypatch):
    native.check_same(name, TABLES[name])
    monkeypatch.setattr(native._C, name, 7)
    with pytest.raises(ImportError, match=rf"{name} is 7 in .*, expected .*: install fastppo again"):
        native.check_same(name, TABLES[name])


def test_an_extension_of_an_older_version_is_refused(cpu_backend, monkeypatch):
    monkeypatch.delattr(native._C, "KL_KINDS")
    with pytest.raises(ImportError, match="KL_KINDS is None"):
        native.check_same("KL_KINDS", TABLES["KL_KINDS"])


def test_statistics_have_the_order_of_the_sums():
    assert PPOStats._fields == ppo_loss.PPO_STATISTICS
