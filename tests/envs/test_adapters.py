"""Environments of other libraries, against the installed packages: Gymnasium, reasoning-gym, textarena."""

from __future__ import annotations

import random
import sys

import pytest

from fastppo.environment_config import EnvironmentConfig
from fastppo.envs.adapters import READY_ENVIRONMENTS, Gymnasium, ReasoningGym, TextArena
from fastppo.envs.source import source_of
from fastppo.recipe import load_recipe, resolve_environment
from fastppo.rewards.reasoning_gym import task_rows
from tests.envs.chat import chat_of, make_chat_tokenizer
from tests.envs.worlds import make_engine, play, threads
from tests.tiny import LETTERS

ROW = {"prompt": "Play."}


def spoken(environment, *answers, row=ROW, seed=1):
    """What it says and pays: the first observation, then (observation, reward, over) of each answer."""
    said = [environment.reset(**{"row": row, "seed": seed} if "seed" in reset_arguments(environment) else {"row": row})]
    for answer in answers:
        observation, reward, terminated, truncated, _ = environment.step(answer)
        said.append((observation, reward, terminated or truncated))
    return said


def reset_arguments(environment):
    return environment.reset.__code__.co_varnames


@pytest.mark.parametrize("name", READY_ENVIRONMENTS)
def test_a_package_that_is_missing_is_named_with_its_command(name, monkeypatch):
    module = "reasoning_gym" if name == "reasoning_gym" else name
    for loaded in [key for key in sys.modules if key.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    arguments = {"mcp": [["python"]], "openenv": ["http://x", "a", "b"], "reasoning_gym": []}.get(name, ["x"])
    with pytest.raises(ImportError, match=rf"pip install fastppo\[{name.replace('_', '-')}\]"):
        READY_ENVIRONMENTS[name](*arguments)


# Gymnasium


@pytest.fixture
def echo():
    """A registered environment over texts that pays for what it said."""
    gymnasium = pytest.importorskip("gymnasium", reason="pip install fastppo[gymnasium]")

    class Echo(gymnasium.Env):
        observation_space = gymnasium.spaces.Text(8, charset=LETTERS)
        action_space = gymnasium.spaces.Text(1, charset=LETTERS)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.letter = LETTERS[self.np_random.integers(len(LETTERS))]
            self.options = options
            return self.letter, {}

        def step(self, action):
            return "b", float(action == self.letter), True, False, {}

    gymnasium.register("fastppo/Echo-v0", Echo)
    yield Gymnasium("fastppo/Echo-v0")
    del gymnasium.registry["fastppo/Echo-v0"]


def test_gymnasium_over_texts(echo):
    first, wrong, last = spoken(echo(), "no such letter", "a")
    assert first.startswith("Play.\n") and first[-1] in LETTERS
    assert wrong[0].startswith("\n'no such letter' is no action, expected one of Text(") and wrong[1:] == (0.0, False)
    assert last == ("\nb", float(first[-1] == "a"), True)
    assert spoken(echo(), first[-1])[1][1] == 1.0
    played = play(echo)
    assert all(episode.error is None for episode in played.episodes) and not threads()


def test_gymnasium_that_renders_texts():
    pytest.importorskip("gymnasium", reason="pip install fastppo[gymnasium]")
    lake = Gymnasium("FrozenLake-v1", render_mode="ansi", is_slippery=False)()
    first, right, wrong, *others = spoken(lake, "2", "north", " 2\n", "1", "1", "1", "2")
    assert "SFFF" in first.replace("\x1b[41m", "").replace("\x1b[0m", "")
    assert "Right" in right[0] and wrong[0] == "\n'north' is no action, expected one of Discrete(4)\n"
    assert [reward for _, reward, _ in others] == [0, 0, 0, 0, 1] and others[-1][2]


@pytest.mark.parametrize(
    ("id", "arguments", "message"),
    [
        ("FrozenLake-v9", {}, "gymnasium.make makes nothing of 'FrozenLake-v9'"),
        ("FrozenLake-v1", {"size": 4}, "makes nothing of 'FrozenLake-v1', .'size': 4."),
        ("FrozenLake-v1", {}, 'its observations are Discrete.16., expected Text, or render_mode "ansi"'),
    ],
)
def test_gymnasium_that_does_not_fit(id, arguments, message):
    pytest.importorskip("gymnasium", reason="pip install fastppo[gymnasium]")
    with pytest.raises(ValueError, match=message):
        Gymnasium(id, **arguments)


# reasoning-gym


@pytest.fixture
def problem():
    pytest.importorskip("reasoning_gym", reason="pip install fastppo[reasoning-gym]")
    (row,) = task_rows("chain_sum", {"size": 1, "seed": 1})
    return row


def test_one_answer_to_a_problem(problem):
    environment = ReasoningGym()()
    assert spoken(environment, f"So <answer>{problem['answer']}</answer>", row=problem) == [None, (None, 1.0, True)]
    (_, (observation, reward, over)) = spoken(environment, "none", row=problem)
    assert observation is None and reward < 1 and over


def test_a_wrong_answer_may_be_tried_again_and_the_best_is_paid(problem):
    environment = ReasoningGym(attempts=3, wrong=" No. ")()
    _, first, second = spoken(environment, "none", problem["answer"], row=problem)
    assert first[0] == " No. " and not first[2] and second[2]
    assert first[1] + second[1] == 1.0
    _, *answers = spoken(environment, "none", "none", "none", row=problem)
    assert [over for *_, over in answers] == [False, False, True]
    assert [reward for _, reward, _ in answers][1:] == [0.0, 0.0]


def test_problems_need_their_columns_and_a_number_of_tries():
    pytest.importorskip("reasoning_gym", reason="pip install fastppo[reasoning-gym]")
    with pytest.raises(ValueError, match="the row has no question, answer, .*expected the columns of the data"):
        ReasoningGym()().reset(ROW)
    for attempts in (0, True, "2"):
        with pytest.raises(ValueError, match="attempts is .*, expected a whole number >= 1"):
            ReasoningGym(attempts=attempts)


def test_only_what_says_more_needs_a_template_that_keeps_history():
    pytest.importorskip("reasoning_gym", reason="pip install fastppo[reasoning-gym]")
    last = "{% if m.role == 'user' or loop.last %}{{ m.content }}{% endif %}"  # forgets what the assistant said
    tokenizer = make_chat_tokenizer("{% for m in messages %}" + last + "{% endfor %}")
    arguments = make_engine(), tokenizer, chat_of(tokenizer), EnvironmentConfig()
    source_of(ReasoningGym(), *arguments)
    with pytest.raises(ValueError, match="the chat template of somebody/a-model rewrites an earlier turn"):
        source_of(ReasoningGym(attempts=2), *arguments)


# textarena


@pytest.fixture(scope="module")
def guess():
    pytest.importorskip("textarena", reason="pip install fastppo[textarena]")
    return TextArena("GuessTheNumber-v0", min_number=1, max_number=5)


def test_a_game_for_one_player(guess):
    world, found = guess(), []
    for number in range(1, 6):
        first, *answers = spoken(world, str(number), seed=7)
        found += [number for _, reward, _ in answers if reward == 1.0]
    assert first.startswith("Play.\n[GAME] You are Player 0. You are playing Guess The Number.")
    assert len(found) == 1
    other = found[0] % 5 + 1
    _, hint, right = spoken(world, f"I say [{other}]", f"[{found[0]}]", seed=7)
    assert hint == (f"\n[GAME] The target number is {'lower' if other > found[0] else 'higher'}.\n", 0.0, False)
    assert right == (None, 1.0, True)


def test_a_game_is_its_seeds_whatever_others_draw(guess):
    """Games draw from Python's own random numbers: those of others stay as they are, and the other way about."""

    def secret(seed, disturb=False):
        world = guess()
        random.seed(seed * 99)
        world.reset(ROW, seed)
        after = random.random()
        random.seed(seed * 99)
        assert random.random() == after
        return world._game.game_number

    drawn = [secret(seed) for seed in range(12)]
    assert drawn == [secret(seed) for seed in range(12)] and len(set(drawn)) > 2


def take_all(observation, chance):
    """Takes a whole pile, any that is left."""
    piles = [line.split(":") for line in observation.rpartition("Current Pile:")[2].strip().splitlines()[:3]]
    left = [(name.split()[-1], int(count)) for name, count in piles if int(count)]
    name, count = chance.choice(left)
    return f"[{name} {count}]"


@pytest.mark.parametrize("player", [0, 1])
def test_a_game_against_an_opponent(player):
    pytest.importorskip("textarena", reason="pip install fastppo[textarena]")
    world = TextArena("Nim-v0", players=2, player=player, opponent=take_all, piles=[1, 1, 1])()
    first, *answers = spoken(world, "[9 9]", "[9 9]")
    assert f"Welcome to Nim, Player {player}!" in first and ("removes" in first) == (player == 1)
    assert "attempted an invalid move" in answers[0][0] and answers[1][1:] == (-1.0, True)
    heard, over = world.reset(ROW, 1), False
    while not over:
        observation, reward, over, *_ = world.step(take_all(heard, random.Random(0)))
        heard += observation or ""
    assert reward == (1.0 if player == 0 else -1.0)  # of three piles who begins takes the last


def test_opponents_have_their_own_chance_from_the_seed():
    pytest.importorskip("textarena", reason="pip install fastppo[textarena]")
    drawn = []

    def draws(observation, chance):
        drawn.append(chance.random())
        return take_all(observation, chance)

    world = TextArena("Nim-v0", players=2, player=1, opponent=draws)()
    for seed in (3, 4, 3):
        world.reset(ROW, seed)
    assert drawn[-3] == drawn[-1] != drawn[-2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"game": "GuessTheNumbr-v0"}, "textarena has no game 'GuessTheNumbr-v0'; the nearest is GuessTheNumber-v0"),
        ({"game": "Nim-v0"}, "players is 1: The number of players has to be 2"),
        ({"game": "Nim-v0", "players": 2}, "opponent is None, expected who plays the others"),
        ({"game": "GuessTheNumber-v0", "opponent": take_all}, "opponent is .*, expected None with one player"),
        ({"game": "Nim-v0", "players": 2, "player": 2, "opponent": take_all}, "player is 2, expected from 0 to .* 1"),
    ],
)
def test_games_that_do_not_fit(arguments, message):
    pytest.importorskip("textarena", reason="pip install fastppo[textarena]")
    with pytest.raises(ValueError, match=message):
        TextArena(**arguments)


# Recipes


def test_a_recipe_names_them(tmp_path):
    pytest.importorskip("gymnasium", reason="pip install fastppo[gymnasium]")
    (tmp_path / "recipe.yaml").write_text("environment: {factory: gymnasium, arguments: {id: Nothing-v0}}")
    with pytest.raises(ValueError, match="environment.arguments: gymnasium.make makes nothing of 'Nothing-v0'"):
        resolve_environment(load_recipe(tmp_path / "recipe.yaml").environment)
    (tmp_path / "recipe.yaml").write_text("environment: {factory: gymnasium, arguments: {name: Nothing-v0}}")
    with pytest.raises(
        ValueError, match="environment.arguments is .*, but gymnasium missing a required argument: 'id'"
    ):
        resolve_environment(load_recipe(tmp_path / "recipe.yaml").environment)
    (tmp_path / "recipe.yaml").write_text("environment: {factory: gymnasum}")
    with pytest.raises(ValueError, match=r"expected the name of a ready function \(the nearest is gymnasium\)"):
        resolve_environment(load_recipe(tmp_path / "recipe.yaml").environment)
    settings = "{id: FrozenLake-v1, render_mode: ansi}"
    (tmp_path / "recipe.yaml").write_text(f"environment: {{factory: gymnasium, arguments: {settings}}}")
    assert isinstance(resolve_environment(load_recipe(tmp_path / "recipe.yaml").environment), Gymnasium)
