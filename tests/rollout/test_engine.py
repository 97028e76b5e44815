"""The engine: order, independence of the batch, shared prefill, finish reasons, errors, recovery."""

from __future__ import annotations

import math

import pytest
import torch

from fastppo import use_backend
from fastppo.model import lm_head, prepare_model
from fastppo.rollout import Engine, FinishReason, SamplingParams, model_runner
from fastppo.rollout.generation import DRAWS_AHEAD
from fastppo.rollout.model_runner import ModelRunner
from tests.rollout.tiny import (
    CONTEXT,
    VOCAB_SIZE,
    assert_logprobs_are_the_models,
    make_chain,
    make_model,
    ragged_prompts,
)
from tests.tolerance import assert_as_exact_as_native, assert_rounds_to

STOP, LENGTH, ERROR = (int(reason) for reason in FinishReason)


@pytest.fixture(scope="module")
def llama():
    return prepare_model(make_model("llama", eos_token_id=7))


@pytest.fixture(scope="module")
def roomy_llama():
    return make_model("llama", max_position_embeddings=256)


@pytest.fixture(params=[0, 1], ids=["in-step", "ahead"], autouse=True)
def draws_ahead(request, monkeypatch):
    """Everything here holds as well where the host looks at a draw when the next is under way, as on a GPU."""
    monkeypatch.setitem(DRAWS_AHEAD, "cpu", request.param)
    return request.param


def _generate(model, prompts, *, max_batch_size=64, **params):
    return Engine(model, max_batch_size=max_batch_size).generate(prompts, SamplingParams(**params))


class TestIndependence:
    """A completion depends on weights, prompt, seed and sequence number only."""

    params = dict(n=3, temperature=1.0, max_new_tokens=14, seed=5)

    @pytest.mark.parametrize("max_batch_size", [1, 2, 5, 16])
    def test_of_batch_size_and_refill(self, llama, max_batch_size):
        prompts = ragged_prompts()
        whole = _generate(llama, prompts, **self.params)
        other = _generate(llama, prompts, max_batch_size=max_batch_size, **self.params)
        assert other.completions() == whole.completions()
        assert other.finish_reasons.equal(whole.finish_reasons)
        assert_logprobs_are_the_models(other, llama)

    def test_of_later_prompts(self, llama):
        prompts = ragged_prompts()
        few = _generate(llama, prompts[:2], **self.params)
        assert few.completions() == _generate(llama, prompts, **self.params).completions()[: 2 * 3]

    def test_of_prompt_order_when_greedy(self, llama):
        prompts = ragged_prompts()
        forward = _generate(llama, prompts, temperature=0, max_new_tokens=9).completions()
        assert _generate(llama, prompts[::-1], temperature=0, max_new_tokens=9).completions() == forward[::-1]

    def test_of_global_random_state(self, llama):
        first = _generate(llama, ragged_prompts(), **self.params)
        torch.manual_seed(99)
        assert _generate(llama, ragged_prompts(), **self.params).completions() == first.completions()

    def test_but_not_of_seed_and_sample(self, llama):
        rollout = _generate(llama, ragged_prompts(), **self.params)
        assert rollout.completions()[0] != rollout.completions()[1]
        other = _generate(llama, ragged_prompts(), **{**self.params, "seed": 6})
        assert other.completions() != rollout.completions()


class TestOrder:
    def test_prompt_major_whatever_finishes_first(self):
        # From token k it takes k steps to 0, which is EOS.
        model = make_chain([0, 0, 1, 2, 3, 4, 5, 6])
        rollout = _generate(model, [[7], [1], [4], [2]], max_batch_size=2, n=2, temperature=0, max_new_tokens=20)
        chains = [[6, 5, 4, 3, 2, 1, 0], [0], [3, 2, 1, 0], [1, 0]]
        assert rollout.completions() == [chain for chain in chains for _ in range(2)]
        assert rollout.prompt_index.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert rollout.finish_reasons.tolist() == [STOP] * 8

    def test_prompts_as_tensors_and_arrays(self):
        model = make_chain([0, 0, 1, 2])
        for prompts in (torch.tensor([[3], [2]]), torch.tensor([[3], [2]]).numpy()):
            assert _generate(model, prompts, temperature=0).completions() == [[2, 1, 0], [1, 0]]

    def test_packed_layout(self):
        rollout = _generate(make_chain([0, 0, 1, 2]), [[3], [2, 3, 1]], temperature=0)
        assert rollout.tokens.tolist() == [3, 2, 1, 0, 2, 3, 1, 0]
        assert rollout.cu_seqlens.tolist() == [0, 4, 8]
        assert rollout.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
        assert rollout.action_mask.tolist() == [False, True, True, True, False, False, False, True]
        assert (rollout.logprobs < 0).all()

    def test_progress_counts_up_to_all(self):
        seen = []
        engine = Engine(make_chain([0, 0, 1, 2]), max_batch_size=2)
        engine.generate([[3], [1], [2]], SamplingParams(temperature=0), progress=lambda *counts: seen.append(counts))
        assert seen == sorted(seen) and seen[-1] == (3, 3)


@pytest.mark.parametrize("n, max_batch_size", [(1, 64), (4, 64), (4, 4), (5, 2), (3, 4)])
def test_each_prompt_is_run_once_for_all_its_samples(llama, n, max_batch_size):
    sizes = []
    hook = llama.get_input_embeddings().register_forward_hook(lambda _, args, __: sizes.append(args[0].numel()))
    prompts = ragged_prompts()
    try:
        rollout = _generate(llama, prompts, n=n, max_new_tokens=4, ignore_eos=True, max_batch_size=max_batch_size)
    finally:
        hook.remove()
    decoded = rollout.num_actions - rollout.num_sequences  # the last token of a completion is never run
    shape_probe = 1  # token, by which a new engine learns what a layer keeps
    assert sum(sizes) == shape_probe + sum(map(len, prompts)) + decoded


def test_many_prompts_are_prefilled_in_several_forwards(llama, monkeypatch):
    expected = _generate(llama, ragged_prompts(), temperature=0, max_new_tokens=5).completions()
    monkeypatch.setattr("fastppo.rollout.admission.PREFILL_TOKENS", 20)
    monkeypatch.setattr(ModelRunner, "_parts", lambda _: None)
    assert _generate(llama, ragged_prompts(), temperature=0, max_new_tokens=5).completions() == expected


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2", "gpt_oss", "deepseek_v3"])
def test_long_prompts_are_prefilled_in_chunks(family, monkeypatch):
    """Windows, soft-capping and sinks reach back over a chunk's first token, where the model's modules run."""
    model = make_model(family)
    expected = _generate(model, ragged_prompts((30, 3, 17)), temperature=0, max_new_tokens=5)
    monkeypatch.setattr(ModelRunner, "_parts", lambda _: None)
    monkeypatch.setattr("fastppo.rollout.admission.PREFILL_TOKENS", 4)
    monkeypatch.setattr("fastppo.rollout.decoder.PREFILL_TOKENS", 4)
    monkeypatch.setattr("fastppo.rollout.decoder.CHUNK_TOKENS", 7)
    found = _generate(model, ragged_prompts((30, 3, 17)), temperature=0, max_new_tokens=5)
    assert found.completions() == expected.completions()
    assert_logprobs_are_the_models(found, model)


class TestPages:
    """Sequences longer than a page, pages shared between samples, and too few pages for all at once."""

    prompts = ragged_prompts((130, 64, 5, 63, 128, 65))
    params = dict(n=3, max_new_tokens=70, seed=4, ignore_eos=True)

    @pytest.fixture
    def model(self, roomy_llama):
        return roomy_llama

    @pytest.mark.parametrize("max_batch_size", [2, 7, 64])
    @pytest.mark.parametrize("pages", [8, 13, 100])
    def test_number_of_pages_changes_nothing(self, model, pages, max_batch_size):
        """From waiting for nearly every sequence to none. A page of this model takes 16 KiB."""
        plain = _generate(model, self.prompts, **self.params)
        engine = Engine(model, max_batch_size=max_batch_size, kv_memory=pages * 16 / 2**20)
        rollout = engine.generate(self.prompts, SamplingParams(**self.params))
        assert rollout.completions() == plain.completions()
        assert engine.stats.pages <= pages and engine.stats.peak_pages <= pages

    def test_samples_share_the_full_pages_of_their_prompt(self, model):
        engine = Engine(model)
        engine.generate([self.prompts[0]], SamplingParams(n=8, max_new_tokens=10, ignore_eos=True))
        assert engine.stats.peak_pages == 2 + 8, "two full pages for all, and one page each for the rest"
        assert engine.stats.prefill_tokens == 130 and engine.stats.shared_prompt_tokens == 7 * 130

    def test_one_sequence_that_cannot_fit_is_an_error(self, model):
        engine = Engine(model, kv_memory=4 * 16 / 2**20)
        with pytest.raises(
            ValueError, match=r"prompts\[1\] with 130 tokens and 100 new ones needs .* expected at most"
        ):
            engine.generate([[1], self.prompts[0]], SamplingParams(n=2, max_new_tokens=100))
        assert engine.generate([self.prompts[0]], SamplingParams(max_new_tokens=100)).num_sequences == 1

    def test_cache_is_kept_or_given_back(self, model):
        for keep in (False, True):
            engine = Engine(model, keep_cache=keep)
            first = engine.generate(self.prompts, SamplingParams(**self.params))
            assert (engine.runner.kept_cache is not None) == keep
            assert engine.generate(self.prompts, SamplingParams(**self.params)).completions() == first.completions()

    def test_a_cache_is_kept_while_it_takes_its_share_of_the_memory(self, model, monkeypatch):
        """What the trainer asks for on a GPU: graphs serve the next step, and an update is not starved by a large cache."""
        engine = Engine(model, keep_cache=0.25)
        engine.generate([[1]], SamplingParams(max_new_tokens=2))
        held = engine.runner.kept_cache.bytes
        for memory, kept in ((4 * held, True), (4 * held - 1, False)):
            monkeypatch.setattr(model_runner, "device_memory", lambda _, memory=memory: memory)
            engine.generate([[1]], SamplingParams(max_new_tokens=2))
            assert (engine.runner.kept_cache is not None) == kept

    @pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), "half"])
    def test_a_share_that_is_none(self, model, share):
        with pytest.raises((TypeError, ValueError), match="keep_cache is .*, expected"):
            Engine(model, keep_cache=share)

    def test_kept_cache_grows_and_follows_the_model_type(self):
        model = make_model("llama", max_position_embeddings=256)
        engine = Engine(model, keep_cache=True)
        engine.generate([[1]], SamplingParams(max_new_tokens=2))
        before = engine.runner.kept_cache.pages
        engine.generate(self.prompts, SamplingParams(**self.params))
        assert engine.runner.kept_cache.pages > before
        model.to(torch.bfloat16)
        assert engine.generate([[1, 2]], SamplingParams(max_new_tokens=2)).num_sequences == 1
        assert engine.runner.kept_cache.layers[0][0].dtype == torch.bfloat16


def test_statistics_of_a_call(llama):
    engine = Engine(llama, max_batch_size=4)
    rollout = engine.generate(ragged_prompts(), SamplingParams(n=2, max_new_tokens=9, ignore_eos=True))
    stats = engine.stats
    assert stats.prefill_tokens == sum(map(len, ragged_prompts())) == stats.shared_prompt_tokens
    assert stats.decode_tokens == rollout.num_actions - rollout.num_sequences
    assert stats.new_tokens == rollout.num_actions and stats.tokens_per_second > 0
    assert stats.shared_prompt_share == 0.5
    assert stats.slots == 4 and 0.5 < stats.occupancy <= 1
    read_a_step = 4 * (llama.num_parameters() - llama.get_input_embeddings().weight.numel())
    keys_and_values = 2 * 2 * 2 * 8 * 4  # layers, heads, size, bytes
    seen = sum(sum(range(n, n + 8)) + 8 for n in map(len, ragged_prompts()) for _ in range(2))
    assert stats.decode_bytes == stats.decode_steps * read_a_step + seen * keys_and_values
    assert stats.decode_tokens_per_second > 0 and stats.prefill_tokens_per_second > 0


def test_tokens_are_told_as_they_come(llama):
    seen: dict[int, list[int]] = {}

    def note(tokens):
        for sequence, token in tokens:
            seen.setdefault(sequence, []).append(token)

    rollout = Engine(llama, max_batch_size=3).generate(
        ragged_prompts(), SamplingParams(n=2, max_new_tokens=6), on_tokens=note
    )
    assert [seen[sequence] for sequence in range(10)] == rollout.completions()


class TestFinish:
    chain = [0, 0, 1, 2, 3, 4, 5, 6]

    def _run(self, prompt=(5,), model=None, **params):
        rollout = _generate(model or make_chain(self.chain), [list(prompt)], **{"temperature": 0, **params})
        return rollout.completions()[0], rollout.finish_reasons.item()

    def test_eos_stops_and_is_kept(self):
        assert self._run() == ([4, 3, 2, 1, 0], STOP)

    def test_eos_as_the_last_allowed_token_is_a_stop(self):
        assert self._run(max_new_tokens=5) == ([4, 3, 2, 1, 0], STOP)

    def test_max_new_tokens(self):
        assert self._run(max_new_tokens=4) == ([4, 3, 2, 1], LENGTH)

    def test_ignore_eos(self):
        assert self._run(max_new_tokens=7, ignore_eos=True) == ([4, 3, 2, 1, 0, 0, 0], LENGTH)

    def test_stop_token_ids(self):
        assert self._run(stop_token_ids=(2, 6)) == ([4, 3, 2], STOP)
        assert self._run(stop_token_ids=(2,), ignore_eos=True) == ([4, 3, 2], STOP)

    def test_several_eos_ids_of_the_generation_config(self):
        model = make_chain(self.chain)
        model.generation_config.eos_token_id = [3, 0, 4_000_000]
        assert self._run(model=model) == ([4, 3], STOP)

    def test_pad_equal_to_eos_changes_nothing(self):
        model = make_chain(self.chain)
        model.config.pad_token_id = model.generation_config.pad_token_id = 0
        assert self._run(model=model) == ([4, 3, 2, 1, 0], STOP)
        assert self._run(prompt=(0, 5), model=model) == ([4, 3, 2, 1, 0], STOP)

    def test_context_is_the_limit(self):
        completion, reason = self._run(prompt=[3] * (CONTEXT - 2), ignore_eos=True)
        assert (completion, reason) == ([2, 1], LENGTH)

    def test_min_new_tokens_bans_stops_until_then(self):
        completion, reason = self._run(prompt=(1,), min_new_tokens=3, max_new_tokens=40, stop_token_ids=(1,))
        assert not {0, 1} & set(completion[:3])
        assert completion[-1] in (0, 1) and reason == STOP

    def test_min_new_tokens_leaves_raw_logprobs_of_the_untouched_logits(self):
        model = make_chain(self.chain, gap=3.0)
        rollout = _generate(model, [[1]], n=64, min_new_tokens=1, max_new_tokens=1, seed=3)
        assert 0 not in sum(rollout.completions(), [])
        # 8 tokens, EOS is 3 nats ahead of 7 others, which share the distribution when it is banned.
        assert_logprobs_are_the_models(rollout, model)
        assert_rounds_to(rollout.processed_logprobs, -math.log(7))


class TestNaN:
    """A token whose embedding is NaN poisons the sequences that hold it and no other, nor the slots they leave."""

    @pytest.fixture
    def poisoned(self):
        model = prepare_model(make_model("llama", tie_word_embeddings=False))
        model.get_input_embeddings().weight.data[50] = torch.nan
        return model

    @pytest.mark.parametrize("max_batch_size", [1, 2, 8])
    def test_prompt(self, poisoned, max_batch_size):
        good = [[3, 4, 5], [6, 7], [8, 9, 10, 11], [12]]
        prompts = [good[0], [1, 50, 2], good[1], [50], good[2], good[3]]
        params = dict(temperature=0, max_new_tokens=6, max_batch_size=max_batch_size)
        rollout = _generate(poisoned, prompts, **params)
        assert rollout.finish_reasons.tolist() == [LENGTH, ERROR, LENGTH, ERROR, LENGTH, LENGTH]
        completions = rollout.completions()
        assert completions[1] == completions[3] == []
        expected = _generate(poisoned, good, **params).completions()
        assert [completions[i] for i in (0, 2, 4, 5)] == expected
        assert rollout.logprobs.isfinite().all()
        assert rollout.action_counts[1] == 0

    def test_in_the_middle(self):
        model = prepare_model(make_chain([0, 0, 1, 2, 3, 4]))
        model.model.embed_tokens.weight.data[2] = torch.nan
        rollout = _generate(model, [[5], [1], [4], [5], [1]], temperature=0, max_batch_size=2)
        # 2 is drawn like any token; only what follows it cannot be.
        assert rollout.completions() == [[4, 3, 2], [0], [3, 2], [4, 3, 2], [0]]
        assert rollout.finish_reasons.tolist() == [ERROR, STOP, ERROR, ERROR, STOP]

    def test_while_stops_are_banned(self, poisoned):
        rollout = _generate(poisoned, [[50], [3]], stop_token_ids=(1,), min_new_tokens=3, max_new_tokens=3)
        assert rollout.finish_reasons.tolist() == [ERROR, LENGTH]


class TestRecovery:
    def test_exception_or_interrupt_in_the_middle(self, llama):
        engine = Engine(llama, max_batch_size=2)
        params = SamplingParams(n=2, max_new_tokens=6, seed=1)
        expected = engine.generate(ragged_prompts(), params).completions()

        def interrupt(done, total):
            raise KeyboardInterrupt

        llama.train()
        with pytest.raises(KeyboardInterrupt):
            engine.generate(ragged_prompts(), params, progress=interrupt)
        assert llama.training
        assert engine.generate(ragged_prompts(), params).completions() == expected

    def test_modes_of_single_modules_are_restored(self, llama):
        llama.train()
        llama.model.norm.eval()
        _generate(llama, [[1]], max_new_tokens=2)
        assert llama.training and llama.lm_head.training and not llama.model.norm.training

    def test_results_can_be_used_in_autograd(self, llama):
        rollout = _generate(llama, [[1]], max_new_tokens=2)
        weight = torch.ones(1, requires_grad=True)
        (weight * rollout.logprobs).sum().backward()
        assert weight.grad is not None and torch.is_grad_enabled()

    def test_weights_are_live(self):
        model = make_chain([0, 0, 1, 2, 3])
        engine = Engine(model)
        assert engine.generate([[4]], SamplingParams(temperature=0)).completions() == [[3, 2, 1, 0]]
        with torch.no_grad():
            model.lm_head.weight.copy_(make_chain([0, 0, 0, 2, 2]).lm_head.weight)
        assert engine.generate([[4]], SamplingParams(temperature=0)).completions() == [[2, 0]]


class TestDecodeLinears:
    """The model's own linear layers run our kernel during decode steps, and only then."""

    def test_layers_are_as_before_afterwards(self, llama):
        engine = Engine(llama)

        def interrupt(done, total):
            raise KeyboardInterrupt

        engine.generate([[1]], SamplingParams(max_new_tokens=3))
        with pytest.raises(KeyboardInterrupt):
            engine.generate([[1]], SamplingParams(max_new_tokens=3), progress=interrupt)
        assert not any("forward" in module.__dict__ for module in llama.modules())

    def test_reference_backend_samples_the_same(self, llama):
        params = dict(n=2, max_new_tokens=12, seed=3)
        ours = _generate(llama, ragged_prompts(), **params)
        with use_backend("reference"):
            plain = _generate(llama, ragged_prompts(), **params)
        assert ours.completions() == plain.completions()
        assert_logprobs_are_the_models(ours, llama)

    def test_weights_in_other_layouts_and_types(self):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            model = make_model("qwen2", dtype=dtype)
            down = model.model.layers[0].mlp.down_proj
            down.weight.data = down.weight.data.t().contiguous().t()  # not contiguous: left to PyTorch
            assert _generate(model, ragged_prompts(), max_new_tokens=3).num_sequences == len(ragged_prompts())


class TestErrors:
    def _raises(self, message, prompts, error=ValueError, model=None, **params):
        with pytest.raises(error, match=message):
            _generate(model or make_chain([0, 0, 1]), prompts, **params)

    def test_no_prompts(self):
        self._raises("prompts is empty", [])

    def test_empty_prompt(self):
        self._raises(r"prompts\[1\] is empty", [[1], []])

    def test_prompt_without_room(self):
        self._raises(rf"prompts\[1\] has {CONTEXT} tokens, expected at most {CONTEXT - 1}", [[1], [1] * CONTEXT])
        assert len(_generate(make_chain([0, 0, 1]), [[1] * (CONTEXT - 1)]).completions()[0]) == 1

    def test_token_outside_the_vocabulary(self):
        self._raises(r"prompts\[0\] has token ids from 1 to 3, expected 0 to 2", [[1, 3]])

    def test_token_that_is_no_integer(self):
        self._raises(r"prompts\[0\] holds 1.5", [[1, 1.5]], error=TypeError)

    def test_single_string(self):
        self._raises("single string", "hello", error=TypeError)

    def test_text_without_tokenizer(self):
        self._raises(r"prompts\[0\] is text", ["hello"])
        self._raises("stop_strings needs a tokenizer", [[1]], stop_strings=("x",))

    def test_stop_id_outside_the_vocabulary(self):
        self._raises(r"stop_token_ids\[0\] is 3", [[1]], stop_token_ids=(3,))

    def test_model_that_was_taken_back(self, llama):
        engine = Engine(make_chain([0, 0]))
        engine.model.set_attn_implementation("sdpa")
        with pytest.raises(ValueError, match="call prepare_model"):
            engine.generate([[1]], SamplingParams())

    @pytest.mark.parametrize("size", [0, -1, 2.0, True])
    def test_batch_size(self, size):
        with pytest.raises(ValueError, match="max_batch_size"):
            Engine(make_chain([0, 0]), max_batch_size=size)


class TestSampling:
    def test_follows_the_distribution(self):
        model = make_chain([0, 3, 1, 2], gap=1.0)
        rollout = _generate(model, [[1]], n=4000, max_new_tokens=1, max_batch_size=4000)
        found = torch.bincount(torch.tensor(rollout.completions()).flatten(), minlength=4) / 4000
        expected = torch.tensor([0.0, 0, 0, 1]).softmax(0)
        deviation = (
            expected * (1 - expected) / 4000
        ).sqrt()  # of a binomial share; beyond five of them are 6 in ten million
        assert ((found - expected).abs() <= 5 * deviation).all()

    def test_top_k_keeps_raw_and_processed_apart(self, llama):
        rollout = _generate(llama, ragged_prompts(), top_k=3, temperature=1.5, max_new_tokens=6)
        assert (rollout.processed_logprobs > rollout.logprobs).all()

    def test_half_precision_logits_are_not_rounded(self):
        model = prepare_model(make_model("qwen2", dtype=torch.bfloat16))
        head, hidden = lm_head(model), torch.randn(5, 32, dtype=torch.bfloat16)
        native, exact = (hidden.to(t) @ model.lm_head.weight.to(t).t() for t in (torch.float32, torch.float64))
        assert_as_exact_as_native(head.logits(hidden), native, exact)
        rollout = _generate(model, ragged_prompts(), max_new_tokens=5)
        assert rollout.logprobs.dtype == torch.float32
        assert max(max(completion) for completion in rollout.completions()) < VOCAB_SIZE


def test_real_model_tells_a_story(stories_model):
    from fastppo.model import load_model, load_tokenizer

    model, tokenizer = load_model(stories_model, dtype="float32", device="cpu"), load_tokenizer(stories_model)
    params = SamplingParams(temperature=0, max_new_tokens=60, stop_strings=(".",))
    rollout = Engine(model, tokenizer).generate(["Once upon a time", "The little dog"], params)
    assert rollout.finish_reasons.tolist() == [STOP, STOP]
    text = tokenizer.decode(rollout.completions()[0])
    assert text.endswith(".") and text.count(".") == 1 and "little" in text
