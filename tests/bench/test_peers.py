"""Peers: who is compared with, what their functions are called with, and what happens where one is absent or fails."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch

from fastppo.bench import __main__ as cli
from fastppo.bench import decode_attention, floors, gae, harness, peers, record
from fastppo.bench import linear_ppo_loss as linear_loss
from fastppo.bench import linear_token_logprobs as linear_logprobs
from fastppo.bench.catalog import OPS, load_cases
from fastppo.bench.run import narrowed
from fastppo.bench.setting import Setting

CPU = torch.device("cpu")


def negative_logprobs(hidden, weight, labels, **options):
    assert options in ({}, {"reduction": "none", "impl": "torch_compile"})
    return -linear_logprobs.eager(hidden, weight, labels)


class LigerGRPO:
    """A loss over [B, T] with one advantage a sequence and an outer mean over the mask, as Liger's "bnpo"."""

    def __init__(self, beta, use_ref_model, chunk_size, epsilon_low, epsilon_high, loss_type):
        assert (beta, use_ref_model, loss_type) == (0.0, False, "bnpo")
        self.clip = {"clip_low": epsilon_low, "clip_high": epsilon_high}

    def __call__(self, hidden, weight, tokens, mask, advantages, old_per_token_logps):
        assert hidden.ndim == 3 and tokens.shape == mask.shape == old_per_token_logps.shape and advantages.ndim == 1
        flat = hidden.flatten(0, 1), weight, tokens.flatten(), old_per_token_logps.flatten()
        return linear_loss.eager(*flat, advantages, mask.flatten(), **self.clip)[0], ()


class TRLChunked:
    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs):
        assert (bias, temperature, softcap, logit_scale, outputs) == (None, 1.0, None, 1.0, ())
        return linear_logprobs.eager(hidden, weight, targets), None, None, None, None


def with_entropy(logits, labels):
    log_p = logits.log_softmax(-1)
    return log_p.gather(-1, labels[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def whitened_gae(rewards, values, mask, gamma, lam):
    """Returns also at masked places, and advantages that are whitened, as verl's."""
    assert mask.dtype == torch.float32
    _, returns = gae.eager(rewards, values, mask.bool(), gamma=gamma, lam=lam)
    return torch.full_like(values, torch.nan), torch.where(mask.bool(), returns, 7.0)


def unmasked_whiten(values, mask):
    kept = values[mask]
    return (values - kept.mean()) * torch.rsqrt(kept.var() + 1e-8)


def paged_attention(q, k_cache, v_cache, cache_seqlens, block_table):
    assert k_cache.shape[1] % 256 == 0 and q.shape[1] == 1 and cache_seqlens.dtype == torch.int32
    return decode_attention.eager(q[:, 0], k_cache, v_cache, block_table, cache_seqlens)[:, None]


def sample(logits, top_k, top_p, filter_apply_order):
    assert filter_apply_order == "top_k_first" and logits.dtype == torch.float32 and top_k and top_p
    return logits.argmax(-1).int()


FAKES = {
    "trl.trainer.utils": {
        "selective_log_softmax": lambda logits, labels: with_entropy(logits, labels)[0],
        "selective_log_softmax_and_entropy": with_entropy,
    },
    "trl.kernels": {"ChunkedLogProbFunction": TRLChunked},
    "liger_kernel.ops": {
        "LigerFusedLinearScaledCrossEntropyFunction": type("L", (), {"apply": staticmethod(negative_logprobs)})
    },
    "liger_kernel.chunked_loss": {"LigerFusedLinearGRPOLoss": LigerGRPO},
    "cut_cross_entropy": {"linear_cross_entropy": negative_logprobs},
    "verl.utils.torch_functional": {
        "logprobs_from_logits": lambda logits, labels, inplace_backward: with_entropy(logits, labels)[0],
        "entropy_from_logits": lambda logits: with_entropy(logits, torch.zeros(len(logits), dtype=torch.long))[1],
        "masked_whiten": unmasked_whiten,
    },
    "verl.trainer.ppo.core_algos": {"compute_gae_advantage_return": whitened_gae},
    "verl.utils.kernel.linear_cross_entropy": {
        "linear_cross_entropy": lambda hidden, weight, labels, temperature, reduction: (
            linear_logprobs.eager(hidden, weight, labels),
            None,
        )
    },
    "flash_attn": {"flash_attn_with_kvcache": paged_attention},
    "flashinfer.sampling": {"top_k_top_p_sampling_from_logits": sample},
}


@pytest.fixture
def packages(monkeypatch):
    """Every package is installed, and computes with plain PyTorch; all of them also on a CPU."""
    for name, members in FAKES.items():
        parts = name.split(".")
        for end in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[0]))
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(peers, "installed", lambda: dict(peers.PACKAGES))
    everywhere = {
        op: {name: (function, (peers.CPU, peers.CUDA)) for name, (function, _) in row.items()}
        for op, row in peers.FUNCTIONS.items()
    }
    monkeypatch.setattr(peers, "FUNCTIONS", everywhere)


@pytest.mark.parametrize("op", sorted(peers.FUNCTIONS))
def test_each_package_is_called_as_it_documents(packages, op):
    """Their results, brought into the shape of ours, pass the same check as ours."""
    for case in load_cases(op, Setting(quick=True)):
        inputs = harness.make_inputs(case, CPU)
        exact = case.exact(harness.in_fp64(inputs))
        assert set(peers.FUNCTIONS[op]) <= set(case.providers)
        for name in peers.FUNCTIONS[op]:
            if (op, name) == ("sample_tokens", "flashinfer"):  # the fake draws nothing, so its draws are skewed
                assert case.providers[name](inputs)["tokens"].dtype == torch.int64
                continue
            row, _ = harness.check_provider(case, name, inputs, exact)
            assert row.status == "ok", row.reason


def test_a_folder_of_a_package_s_name_is_no_package(monkeypatch, tmp_path):
    """A checkout beside which the bench is started."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(peers.PACKAGES, "folder", peers.Package("a_checkout", "a-checkout"))
    (tmp_path / "a_checkout").mkdir()
    assert "folder" not in peers.installed()
    (tmp_path / "a_checkout" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert "folder" in peers.installed()


def test_absent_packages_cost_nothing_and_installed_ones_run_on_their_devices(monkeypatch):
    monkeypatch.setattr(peers, "installed", dict)
    assert list(peers.functions("linear_token_logprobs", len, max, "cpu")) == ["fastppo", "eager", "compile"]
    monkeypatch.setattr(peers, "installed", lambda: dict(peers.PACKAGES))
    on_cpu, on_gpu = (set(peers.functions("linear_token_logprobs", len, max, device)) for device in ("cpu", "cuda"))
    assert on_gpu - on_cpu == {"verl"} and {"trl", "liger", "cce"} <= on_cpu
    assert peers.left_out("cpu") == ["flash-attn", "flashinfer"] and not peers.left_out("cuda")


def test_what_a_compiler_does_not_help_is_not_compiled():
    assert "compile" not in peers.functions("gae", len, max, "cpu", compiles=False)


def test_every_package_and_op_of_the_table_exists():
    assert set(peers.FUNCTIONS) <= set(OPS)
    assert {name for row in peers.FUNCTIONS.values() for name in row} | set(peers.DROP_IN) == set(peers.PACKAGES)


@pytest.mark.slow  # a cold cache of compiled code takes long
def test_compiled_eager_is_checked_like_any_other():
    (case,) = load_cases("masked_whiten", Setting(quick=True))
    rows = harness.measure(case, CPU, harness.Schedule(1), floors.Ceilings(1e10))
    assert rows["compile"].status == "ok" and rows["compile"].error is not None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("ligr", "unknown peer 'ligr', did you mean 'liger'?"),
        ("eager,flashinfer", "flashinfer is not installed here: pip install flashinfer-python"),
    ],
)
def test_against_names_what_is_wrong(monkeypatch, capsys, names, message):
    monkeypatch.setattr(peers, "installed", dict)
    assert cli.main(["--against", names]) == 2 and message in capsys.readouterr().err


def test_against_narrows_and_quick_leaves_the_compiler_out(packages):
    (case,) = load_cases("linear_token_logprobs", Setting(quick=True))
    assert list(narrowed(case, True, ("cce",)).providers) == ["fastppo", "cce"]
    assert "compile" in narrowed(case, False, None).providers
    assert "compile" not in narrowed(case, True, None).providers
    assert "compile" in narrowed(case, True, ("compile",)).providers


def test_a_peer_that_fails_has_a_row_that_says_why_and_fails_nothing_else(packages, monkeypatch, capsys, tmp_path):
    def broken(*arguments, **options):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(sys.modules["verl.utils.torch_functional"], "masked_whiten", broken)
    monkeypatch.setattr(record, "package_versions", dict)
    file = tmp_path / "r.json"
    arguments = ["--op", "masked_whiten", "--quick", "--rounds", "1", "--json", str(file)]
    assert cli.main(arguments) == 0
    rows = {row.provider: row for row in record.load(file).rows}
    assert rows["verl"].reason == "RuntimeError: no kernel image is available"
    assert rows["fastppo"].status == rows["eager"].status == "ok"
    assert "peer failed: masked_whiten [8, 128], verl: raised" in capsys.readouterr().err


def test_versions_of_installed_peers_are_in_the_record(monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda: {"rich": peers.Package("rich", "rich")})
    assert "rich" in record.package_versions()
