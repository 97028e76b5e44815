"""Writes preferences.jsonl, for recipes/reward_model.yaml: of two ways in which a story goes on, the one with the happier end is chosen.

python recipes/data/preferences.py
"""

import json
import math
import random
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAIRS = 300

MIDDLES = """One day there was a big storm.|There was a small box by the door.|They went to the park with a red ball.
A bird sat in the old tree.|They found a map under the bed.|The road to the hill was long.|A boat came down the river.
It was a cold day and the sun was low.|They saw a light in the wood.|A dog ran out of the yard.""".replace("\n", "|")
HAPPY = """They laughed and played together all day.|Everyone was happy and they hugged.|They smiled and became best friends.
Mom was proud and gave them a big hug.|They shared the cake and had so much fun.|The sun came out and they danced with joy.
They felt safe and loved.|They were glad that they had helped.|All the friends cheered for them.
They went home with a big smile.""".replace("\n", "|")
SAD = """They cried and went away alone.|Everyone was angry and they shouted.|They were sad and lost their only friend.
Mom was upset and did not look at them.|They dropped the cake and it was all bad.|The rain came down and they were scared.
They felt cold and lonely.|They were sorry that they had broken it.|All the others ran away from them.
They went home with a hurt leg.""".replace("\n", "|")


def pairs() -> list[dict[str, str]]:
    """The same at every call. Both stories of a pair have the prompt, the middle and two last sentences, of which one story has more happy ones.
    As people are not always of one mind, that story is chosen with the probability sigmoid(2 * how many more)."""
    draw = random.Random(0)
    prompts = [json.loads(line)["prompt"] for line in (HERE / "stories_prompts.jsonl").open(encoding="utf-8")]
    middles, happy, sad = (text.split("|") for text in (MIDDLES, HAPPY, SAD))
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    while len(rows) < PAIRS:
        prompt, middle = draw.choice(prompts), draw.choice(middles)
        fewer, more = draw.choice([(0, 1), (0, 2), (1, 2)])
        worse, better = (_story(middle, draw.sample(happy, n) + draw.sample(sad, 2 - n), draw) for n in (fewer, more))
        agrees = draw.random() < 1 / (1 + math.exp(-2 * (more - fewer)))
        chosen, rejected = (better, worse) if agrees else (worse, better)
        rows[prompt, chosen, rejected] = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return list(rows.values())


def _story(middle: str, endings: list[str], draw: random.Random) -> str:
    draw.shuffle(endings)
    return " ".join(["", middle, *endings])


if __name__ == "__main__":
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in pairs())
    (HERE / "preferences.jsonl").write_text("".join(lines), encoding="utf-8")
