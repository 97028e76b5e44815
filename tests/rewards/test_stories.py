"""`happy_ending`: prefers what a reader prefers, and cannot be had cheaply. The prompts of its recipe fit its model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastppo.rewards import happy_ending
from fastppo.rewards.stories import WEIGHTS, story_parts

PROMPTS = Path(__file__).resolve().parents[2] / "recipes" / "data" / "stories_prompts.jsonl"

MIDDLE = "Lily saw a red ball in the tree. She asked Tom to help her get it down. Tom climbed up and pushed the ball with a long stick. "
HAPPY = (
    MIDDLE
    + "It fell on the soft green grass. Lily smiled at him. They played with it all day. Mom hugged them both at home."
)
SAD = (
    MIDDLE
    + "It fell into the deep cold lake. Lily was sad about it. They cried all the way home. Mom was angry with them both."
)


def total(text):
    return happy_ending([text])[0]


def test_parts_make_the_score():
    assert sum(WEIGHTS.values()) == pytest.approx(1)
    assert story_parts(HAPPY) == {"happy": 1, "finished": 1, "varied": 1} and total(HAPPY) == pytest.approx(1)
    assert story_parts(SAD) == {"happy": 0, "finished": 1, "varied": 1}


@pytest.mark.parametrize(
    "worse",
    [
        SAD,
        HAPPY[:-20],  # cut off
        "Mom hugged them both at home.",  # no story
        MIDDLE + "It fell down. " + "They were so happy now. " * 3,
        MIDDLE + "It fell on the grass. Happy. Smiled. Hugged.",
        MIDDLE + "It fell on the grass. They went home. It got dark. Happy smiled hugged laughed friends fun love.",
        "happy smiled loved hugged laughed friends fun joy " * 10,
        ("happy smiled loved hugged laughed friends fun joy " * 10).strip() + ".",
        "They hugged a lot. They smiled a lot. They played a lot. " * 6,
        MIDDLE + "It fell down. Lily never smiled again. They were not happy. Mom didn't love it.",
        "",
        "...!!!",
    ],
)
def test_a_happy_story_beats(worse):
    assert 0 <= total(worse) < total(HAPPY) - 0.15


def test_only_the_ending_counts():
    assert story_parts("They hugged and smiled a lot. They loved their friends so much. " + SAD)["happy"] == 0


def test_speech_ends_a_sentence_too():
    assert story_parts('She said, "I love you!"')["finished"] == 1


def test_conversations():
    assert happy_ending([[{"role": "assistant", "content": HAPPY}]]) == [total(HAPPY)]


@pytest.fixture
def one_thread():
    """The model is so small that threads cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_untrained_model_has_room_to_climb(stories_model, one_thread):
    tokenizer = AutoTokenizer.from_pretrained(stories_model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(stories_model)
    prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()][::3]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    # Stories end with the first token, BOS.
    output = model.generate(
        batch.input_ids,
        attention_mask=batch.attention_mask,
        do_sample=True,
        top_k=0,
        max_new_tokens=96,
        eos_token_id=1,
        pad_token_id=1,
    )
    texts = tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    scores = torch.tensor(happy_ending(texts))
    assert 0.2 < scores.mean() < 0.5 and scores.std() > 0.08 and scores.max() < 0.95


def test_every_prompt_is_spelled_in_the_models_vocabulary(stories_model):
    tokenizer = AutoTokenizer.from_pretrained(stories_model)
    prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()]
    assert len(set(prompts)) == len(prompts) >= 64
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        tokens = tokenizer.convert_ids_to_tokens(ids)
        assert tokenizer.unk_token_id not in ids and not any(token.startswith("<0x") for token in tokens), prompt
        assert len(ids) <= 32 and tokenizer.decode(ids, skip_special_tokens=True) == prompt
