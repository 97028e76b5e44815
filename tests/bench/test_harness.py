"""The bench: counted floors, checks before timing, balanced turns, records, docs and the command line."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace

import pytest
import torch

from fastppo.bench import __main__ as cli
from fastppo.bench import floors, harness, memory, record, report, rollout_gpu
from fastppo.bench.catalog import OPS, load_cases
from fastppo.bench.harness import Case, Row, Schedule, Target, WrongResult, compare_tensors, fill_ratios, measure
from fastppo.bench.setting import Setting
from tests.bench.toys import CEILINGS, a_record, double, toy_case

CPU = torch.device("cpu")
QUICK = Setting(quick=True)


class ToyLM(torch.nn.Module):
    """Embedding [5, 4], trunk [3, 4], head [5, 4]."""

    def __init__(self):
        super().__init__()
        self.embedding, self.trunk = torch.nn.Embedding(5, 4), torch.nn.Linear(4, 3, bias=False)
        self.head = torch.nn.Linear(4, 5, bias=False)

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head


def measured(case: Case, rounds: int = 2) -> dict[str, Row]:
    rows = measure(case, CPU, Schedule(rounds), CEILINGS)
    fill_ratios(rows, Target(speedup=1.0))
    return rows


@pytest.fixture
def few_inputs(monkeypatch):
    """Input sets that exceed this cache are few and quickly made."""
    monkeypatch.setattr(floors, "cache_bytes", lambda device: 6000)


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        # 2 rows of 3 fp32 logits (24), 2 labels (16), 2 log-probs (8)
        (floors.token_logprobs(2, 3, 4), (48, 0)),
        # bf16: logits 3 times (36), labels twice (32), log-probs and entropy out (16), their gradients in (16)
        (floors.token_logprobs(2, 3, 2, entropy=True, backward=True), (100, 0)),
        # hidden 2x3 and weight 5x3 in fp32 (84), labels (16), log-probs (8); 2·2·3·5 flops
        (floors.linear_token_logprobs(2, 3, 5, 4), (108, 60)),
        # operands twice in, once out (252), labels twice (32), log-probs out, their gradient in (16); three products
        (floors.linear_token_logprobs(2, 3, 5, 4, backward=True), (300, 180)),
        # operands in, gradients out (168), labels (16), old_logprobs and advantages (16), mask (2)
        (floors.linear_ppo_loss(2, 3, 5, 4), (202, 180)),
        (floors.gae(10), (160, 0)),
        (floors.gae(10, mask=True), (170, 0)),
        (floors.masked_whiten(10), (90, 0)),
        (floors.approx_kl(10), (120, 0)),
        # forward 3 fp32; backward reads both and the upstream gradient, writes one
        (floors.approx_kl(10, backward=True), (280, 0)),
        # 17 bytes a token, 16 more with values, 4 more with a reference
        (floors.ppo_loss(10), (170, 0)),
        (floors.ppo_loss(10, values=True, reference=True), (370, 0)),
        # 2x3 bf16 logits (12), 2 tokens (16), 3 fp32 each (24)
        (floors.sample_tokens(2, 3, 2), (52, 0)),
        # 10 keys and values of 2 heads of 4 in bf16 (320); queries and results of 3 sequences, 8 heads of 4 (384)
        (floors.decode_attention(10, 3, 8, 2, 4, 2), (704, 0)),
        # fp32 2x3 and 5x3 in, 2x5 out (124); 2·2·3·5 flops
        # forward q, k, v in, out out; backward those four and a gradient in, three out
        (floors.packed_attention(10, 30, 4, 2, 8, 2), (5760, 13440)),
        (floors.batch_invariant_linear(2, 5, 3), (124, 60)),
        # 4 fp32 tensors of 2x3 forward and 4 backward (192), the weight twice in, its gradient out (36)
        (floors.rms_norm(2, 3, 4), (228, 0)),
        # bf16 2x3x4 in and out (96), 2 tables of 5x4 (80), 2 positions (16); and back
        (floors.rotary_embedding(2, 3, 4, 5, 2), (384, 0)),
        # bf16: 3 forward, 5 backward
        (floors.swiglu(10, 2), (160, 0)),
        # ToyLM: 12 weights in the trunk, 20 in the head, the embedding left out; of a batch of 4
        (floors.decode(ToyLM(), 4), (32, 64)),
        # 2 sequences of 3 + 5 tokens: 10 passes of 8 tokens through 12 weights, 6 of 5 through 20; twice that in flops, for each sequence.
        # 5 decode steps read 32 weights; 3 updates move 7 numbers for each weight of policy (52) and critic (32)
        (floors.ppo_step(ToyLM(), 2, 1, 3, 5, 3), (4 * (5 * 32 + 3 * 7 * 84), 2 * 2 * (80 * 12 + 30 * 20))),
        # 4 samples of each: 10 passes of 3 + 4 * 5 tokens, 6 of 4 * 5
        (floors.ppo_step(ToyLM(), 2, 4, 3, 5, 3), (4 * (5 * 32 + 3 * 7 * 84), 2 * 2 * (230 * 12 + 120 * 20))),
        # with a shared trunk: 6 passes of either, updates of the policy's 52 weights alone
        (
            floors.ppo_step(ToyLM(), 2, 4, 3, 5, 3, shared_trunk=True),
            (4 * (5 * 32 + 3 * 7 * 52), 2 * 2 * (6 * 23 * 12 + 120 * 20)),
        ),
        # of the 10 and 6 passes 6 and 3 are the update's
        (floors.ppo_update(ToyLM(), 2, 4, 3, 5, 3), (4 * 3 * 7 * 84, 2 * 2 * (6 * 23 * 12 + 60 * 20))),
    ],
)
def test_floors_equal_hand_counts(work, expected):
    assert tuple(work) == expected


def test_a_wrong_provider_is_not_timed(few_inputs):
    rows = measured(toy_case(providers={"fastppo": lambda x: {"y": x["x"] * 2.001}, "eager": double}))
    ours = rows["fastppo"]
    assert (ours.status, ours.median_s, ours.speedup, ours.target_met) == ("wrong", None, None, False)
    assert "y is off by" in ours.reason and ours.error > 1e-4
    assert rows["eager"].status == "ok" and rows["eager"].rounds > 0


@pytest.mark.parametrize(
    "y", [torch.zeros(1000), torch.full((1000,), torch.nan), torch.zeros(3)], ids=["zeros", "nan", "shape"]
)
def test_wrong_outputs_are_told_apart(y):
    with pytest.raises(WrongResult, match="^y "):
        compare_tensors({}, {"y": y}, {"y": torch.ones(1000, dtype=torch.float64)})


def test_a_missing_output_is_wrong():
    with pytest.raises(WrongResult, match="returns z, expected y"):
        compare_tensors({}, {"z": torch.ones(1)}, {"y": torch.ones(1)})


def test_a_wrong_eager_gives_no_ratio(few_inputs):
    rows = measured(toy_case(providers={"fastppo": double, "eager": lambda x: {"y": x["x"]}}))
    assert rows["fastppo"].status == "ok" and rows["fastppo"].speedup is None and rows["fastppo"].target_met is False


def test_a_raising_provider_gets_its_reason_and_the_rest_goes_on(few_inputs):
    def broken(x):
        raise RuntimeError("no kernel\nsecond line")

    rows = measured(toy_case(providers={"fastppo": broken, "eager": double}))
    assert (rows["fastppo"].status, rows["fastppo"].reason) == ("raised", "RuntimeError: no kernel")
    assert rows["eager"].status == "ok" and rows["eager"].median_s > 0


def test_a_provider_may_raise_later(few_inputs):
    calls = []

    def fails_at_its_third_call(x):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("worn out")
        return double(x)

    rows = measured(toy_case(providers={"fastppo": fails_at_its_third_call, "eager": double}))
    assert rows["fastppo"].status == "raised" and rows["fastppo"].median_s is None
    assert rows["eager"].rounds == 2


def test_failing_inputs_are_a_reason_for_every_provider():
    def no_inputs(generator):
        raise MemoryError("too large")

    rows = measured(toy_case(inputs=no_inputs))
    assert [row.reason for row in rows.values()] == ["the inputs or the reference failed: MemoryError: too large"] * 2


def test_turns_alternate_and_inputs_rotate(few_inputs):
    calls = []

    def provider(name):
        return lambda x: calls.append((name, x["x"].data_ptr())) or double(x)

    measured(toy_case(providers={"fastppo": provider("A"), "eager": provider("B")}), rounds=4)
    timed = calls[2:]  # after one checked call each
    assert "".join(name for name, _ in timed) == "ABBAABBA"
    assert len({pointer for _, pointer in timed[:3]}) == 3, "2 x 6000 bytes of cache take 3 sets of 4000 bytes"


def test_cheap_cases_run_on_for_steadier_medians():
    schedule = Schedule(rounds=20, seconds=0.5)
    assert schedule.goes_on(19, 60.0) and not schedule.goes_on(20, 60.0), "never fewer than asked for"
    assert schedule.goes_on(199, 0.4) and not schedule.goes_on(200, 0.4)
    assert not Schedule(rounds=2).goes_on(2, 0.0)


def test_a_turn_of_a_fast_provider_is_many_calls_and_a_slow_one_is_called_once():
    """One cold call after a slow provider's turn would time the caches that the slow one left."""
    schedule = Schedule(rounds=20, turn_seconds=0.005)
    assert [schedule.calls_a_turn(seconds) for seconds in (1e-4, 0.004, 0.02)] == [50, 2, 1]
    assert Schedule(rounds=20).calls_a_turn(1e-4) == 1


def test_a_case_may_count_pieces_and_set_its_own_rounds():
    """Two calls of 3 and 5 tokens: seconds are those of a token, a turn is one call."""
    made = iter([1] + [3, 5] * 10)

    def provider(x):
        return {"y": 2 * x["x"], "tokens": torch.tensor(next(made))}

    def compare(inputs, outputs, exact):
        return 0.0

    case = toy_case(providers={"fastppo": provider}, per="tokens", rounds=2, compare=compare)
    rows = measure(case, CPU, Schedule(20, 0.5, 0.005), CEILINGS)
    assert rows["fastppo"].status == "ok" and rows["fastppo"].rounds == 2 and next(made) == 3


def test_a_call_may_tell_the_seconds_that_count():
    def provider(x):
        return {"y": 2 * x["x"], "tokens": torch.tensor(4), "seconds": torch.tensor(8.0)}

    case = toy_case(providers={"fastppo": provider, "eager": provider}, per="tokens", seconds="seconds", rounds=2)
    case = replace(case, compare=lambda inputs, outputs, exact: 0.0)
    rows = measure(case, CPU, Schedule(20, provider_seconds=1.0), CEILINGS)
    assert {(row.median_s, row.rounds) for row in rows.values()} == {(2.0, 2)}


def test_decode_steps_of_a_gpu_s_cases_are_counted_alone():
    """Tried on the CPU, with a tiny model: 4 prompts of 12, 7 tokens of each from decode steps."""
    case = rollout_gpu.cases(QUICK)[0]
    inputs = harness.make_inputs(case, CPU)
    for run in case.providers.values():
        outputs = run(inputs)
        assert case.compare(inputs, outputs, {}) < 0.15
        assert int(outputs["decoded"]) == 4 * 7 and 0 < float(outputs["seconds"]) < 60


def test_phases_are_medians_of_every_turn(few_inputs):
    """A provider tells those of its last call; of one that does not there are none."""

    class Told:
        calls = 0

        def __call__(self, x):
            self.calls += 1
            self.phases = {"first": float(self.calls), "second": 0.5}
            return double(x)

    case = toy_case(providers={"fastppo": Told(), "eager": double}, phase_flops={"first": 7, "second": 1})
    rows = measured(case, rounds=3)
    assert rows["fastppo"].phase_s == {"first": 3.0, "second": 0.5}, "calls 2, 3 and 4: the first was the check"
    assert rows["eager"].phase_s is None and rows["eager"].phase_flops == {"first": 7, "second": 1}


def test_floors_of_a_gpu_s_decode_steps():
    """Qwen3-1.7B ties its embeddings: 1.72e9 weights, all of them read. Qwen2.5-7B does not: 7.6e9, one of its two [152064, 3584] not read.

    The counts are known to three digits, so to half a unit of the third: 0.5 %.
    """
    small, large = (case.work for case in rollout_gpu.cases(Setting("cuda")))
    assert small.bytes == pytest.approx(2 * (1.72e9 / 256 + 768 * 2 * 28 * 8 * 128), rel=5e-3)
    assert large.bytes == pytest.approx(2 * (7.07e9 / 64 + 512 * 2 * 28 * 4 * 128), rel=5e-3)
    assert (small.flops, large.flops) == (pytest.approx(2 * 1.72e9, rel=5e-3), pytest.approx(2 * 7.07e9, rel=5e-3))


def test_slow_providers_take_few_turns():
    """Past their seconds: ours and eager three, a peer two. A first call of eager's as long as that is one of them."""
    calls = []

    def provider(name):
        def run(x):
            calls.append(name)
            time.sleep(0.02)
            return double(x)

        return run

    case = toy_case(providers={name: provider(name) for name in ("fastppo", "eager", "peer")})
    for limit, eager_turns in ((0.001, 2), (0.03, 3)):
        calls.clear()
        rows = measure(case, CPU, Schedule(20, provider_seconds=limit), CEILINGS)
        assert {name: row.rounds for name, row in rows.items()} == {"fastppo": 3, "eager": 3, "peer": 2}
        assert {name: calls.count(name) - 1 for name in rows} == {"fastppo": 3, "eager": eager_turns, "peer": 2}
        assert all(0.02 < row.median_s < 0.1 for row in rows.values())
    calls.clear()
    assert {row.rounds for row in measure(replace(case, rounds=3), CPU, Schedule(20), CEILINGS).values()} == {3}


def test_times_and_ratio_are_of_medians():
    row = Row("toy", "[1000]", "fastppo", "ok")
    harness.fill_times(row, toy_case(work=floors.Work(8000, 500)), [4e-6, 1e-6, 2e-6, 3e-6, 100e-6], CEILINGS)
    assert row.median_s == 3e-6 and row.rounds == 5
    assert row.p20_s == pytest.approx(1.8e-6) and row.p80_s == pytest.approx(23.2e-6)
    assert row.gb_per_s == pytest.approx(8 / 3) and row.copy_share == pytest.approx(8 / 30)
    assert row.gflop_per_s == pytest.approx(1 / 6)
    rows = {"fastppo": row, "eager": Row("toy", "[1000]", "eager", "ok", median_s=9e-6, peak_bytes=100)}
    row.peak_bytes = 20
    fill_ratios(rows, Target(speedup=3.1, memory_share=0.2))
    assert row.speedup == pytest.approx(3.0) and row.memory_share == 0.2 and row.target_met is False
    fill_ratios(rows, Target(speedup=2.9, memory_share=0.2))
    assert row.target_met is True and rows["eager"].target_met is None


def test_inputs_are_copies_of_one_set_and_reach_the_reference_in_fp64():
    case = load_cases("token_logprobs", QUICK)[1]
    sets = [made["logits"] for made in harness.input_sets(case, CPU, harness.Schedule(3))]
    first = harness.make_inputs(case, CPU)["logits"]
    assert len(sets) > 1 and len({x.data_ptr() for x in sets}) == len(sets)
    assert all(x.requires_grad and x.is_leaf and torch.equal(x, first) for x in sets)
    wide = harness.in_fp64(harness.make_inputs(case, CPU))
    assert (
        wide["logits"].dtype == torch.float64 and wide["logits"].requires_grad and wide["labels"].dtype == torch.int64
    )


@pytest.mark.parametrize("op", OPS)
def test_every_case_names_its_baseline(op):
    full, quick = load_cases(op, Setting()), load_cases(op, QUICK)
    assert len(full) == len(quick), "a case and its quick one have the same index"
    assert all(case.op == op and {"fastppo", case.baseline} <= case.providers.keys() for case in full)
    assert op == "drop_in" or {case.baseline for case in full} == {"eager"}
    assert len({case.name for case in full}) == len(full)


def test_peak_counts_what_is_touched_beyond_the_outputs():
    def with_scratch(x):
        scratch = torch.ones(16 << 20)  # 64 MiB
        return {"y": scratch[: 8 << 20] + x["x"]}  # 32 MiB that the caller gets

    try:
        peak = memory.cpu_peak(with_scratch, {"x": torch.ones(1)})
    except memory.CannotMeasure as error:
        pytest.skip(str(error))
    assert peak == pytest.approx(64 << 20, abs=4 << 20)  # what the allocator and the threads touch besides


def test_peaks_in_processes_of_their_own():
    """Eager's log-softmax of [512, 32000] fp32 is 65.5 MB, every time that it is asked for."""
    with memory.PeakProcess() as process:
        for provider in ("eager", "nobody", "eager"):
            (peak,) = process.measure("token_logprobs", Setting(), 0, [provider]).values()
            if provider == "nobody":
                assert peak == "KeyError: 'nobody'", "one that fails says why, and others are measured"
            elif isinstance(peak, str) and "clear_refs" in peak:
                pytest.skip(peak)
            else:
                assert 60e6 < peak < 75e6


def test_a_failing_measurement_says_why():
    with memory.PeakProcess() as process:
        for _ in range(2):
            with pytest.raises(memory.CannotMeasure, match="No module named 'fastppo.bench.no_such_op'"):
                process.measure("no_such_op", Setting(), 0, ["eager"])


def test_a_child_that_dies_is_told_from_one_that_answers():
    assert memory.in_a_child(lambda: 7) == 7
    assert memory.in_a_child(lambda: os.kill(os.getpid(), signal.SIGKILL)) == "its process ended with status -9"


def test_a_child_that_takes_too_long_is_ended(monkeypatch):
    monkeypatch.setattr(memory, "TIMEOUT_SECONDS", 1)
    assert memory.in_a_child(lambda: time.sleep(60)) == "took more than 1 s"


def test_record_survives_json(tmp_path):
    told = [replace(row, phase_s={"update": 0.5}, phase_flops={"update": 7}) for row in a_record().rows]
    assert record.load(record.save(a_record(rows=told), tmp_path)).rows == told
    file = record.save(a_record(), tmp_path)
    assert file.name == "a-processor-r-3-2t-avx2-2026-11-22.json"
    assert record.load(file) == a_record()
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data.pop("schema"), "schema None, expected 1"),
        (lambda data: data.pop("date"), r"lacks \['date'\]"),
        (lambda data: data["machine"].pop("isa"), r"machine lacks \['isa'\]"),
        (lambda data: data["rows"][1].update(colour=1), r"rows\[1\].*unknown \['colour'\]"),
    ],
)
def test_a_damaged_record_is_named(tmp_path, damage, message):
    file = record.save(a_record(), tmp_path / "r.json")
    data = json.loads(file.read_text())
    damage(data)
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        record.load(file)


def test_docs_are_written_between_the_markers(tmp_path):
    begin, end = report.MARKERS["cpu"]
    page = tmp_path / "performance.md"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    readme, drop_in = tmp_path / "README.md", tmp_path / "drop-in.md"
    places = "\n".join(report.MARKERS[report.DROP_IN])
    readme.write_text(f"{begin}\n{end}\n{places}\n")
    drop_in.write_text(places)
    for _ in range(2):  # writing again changes nothing
        report.write_docs(a_record(), "r.json", page, readme, drop_in)
        text = page.read_text()
        assert text.startswith(f"before\n{begin}\n") and text.endswith(f"{end}\nafter\n") and "old" not in text
    assert "| gae [256, 1024] | **fastppo** | 1 ms |" in text
    assert "| `gae` [256, 1024] | 1 ms | 50 ms | 50x |" in readme.read_text()
    assert "- gae [256, 1024]: 50.00x eager's speed, target >= 80x: not met" in text
    assert "- ppo_loss 16 tokens, fastppo: wrong: loss is off" in text


@pytest.mark.parametrize(("speedup", "text"), [(0.953, "0.95x"), (9.46, "9.5x"), (99.6, "100x"), (123.4, "123x")])
def test_ratios_are_plain_numbers(speedup, text):
    found = a_record()
    next(row for row in found.rows if row.provider == "fastppo" and row.speedup).speedup = speedup
    assert f"| {text} |" in report.summary(found, "r.json")


def test_docs_refuse_quick_records_and_pages_without_markers(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text("nothing to replace")
    with pytest.raises(ValueError, match="must hold the lines"):
        report.write_docs(a_record(), "r.json", page, page, page)
    with pytest.raises(ValueError, match="quick run"):
        report.write_docs(a_record(quick=True), "r.json", page, page, page)


def test_the_pages_are_what_their_record_gives(tmp_path):
    """docs/performance.md and the figures of the README and docs/drop-in.md were written by the command, from the record they name."""
    texts = [page.read_text() for page in (cli.DOCS, cli.README, cli.DROP_IN)]
    name = texts[0].split("Record: `")[1].split("`")[0]
    pages = tmp_path / "performance.md", tmp_path / "README.md", tmp_path / "drop-in.md"
    for page, text in zip(pages, texts, strict=True):
        page.write_text(text)
    report.write_docs(record.load(record.ROOT / name), name, *pages)
    assert [page.read_text() for page in pages] == texts
