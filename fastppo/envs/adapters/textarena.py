"""Games of textarena (arXiv:2504.11442): for one player, or against opponents."""

from __future__ import annotations

import difflib
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastppo.envs.adapters.optional import imported
from fastppo.envs.environment import Observation, after_prompt
from fastppo.envs.tools import TextMaker

Opponent = Callable[[str, random.Random], str]

_ONE_AT_A_TIME = threading.Lock()  # games draw from Python's own random numbers, which all threads share


class TextArena(TextMaker):
    """Makes games: `TextArena("GuessTheNumber-v0")`, `TextArena("Nim-v0", players=2, opponent=play)`.

    The policy reads the row's prompt and, on a line of its own, what the game says to its player: rules, hints, boards, what others did. Only what
    is new is said in each turn. What the game pays its player is paid in the end.

    Args:
        game: an id of textarena. arguments: of `textarena.make`.
        players: how many the game has. player: which of them the policy is, from 0.
        opponent: plays all others. It is given all that the game has said to that player so far, and a `random.Random` that is its own in the
            episode, and returns that player's move.

    Raises:
        ImportError: textarena is missing. ValueError: it has no such game, or none for so many players; others without an opponent, or the reverse.
    """

    def __init__(
        self, game: str, players: int = 1, player: int = 0, opponent: Opponent | None = None, **arguments: Any
    ) -> None:
        self._library = imported("textarena", "textarena")
        known = self._library.envs.registration.ENV_REGISTRY
        if game not in known:
            near = difflib.get_close_matches(game, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"textarena has no game {game!r}; the nearest is {near}")
        if not 0 <= player < players:
            raise ValueError(f"player is {player}, expected from 0 to players - 1 = {players - 1}")
        if (opponent is None) != (players == 1):
            raise ValueError(
                f"opponent is {opponent!r}, expected {'None with one player' if players == 1 else 'who plays the others'}"
            )
        self._game, self._arguments, self._seats = known[game], arguments, (players, player, opponent)
        self().reset({"prompt": ""}, 0)

    def __call__(self) -> TextArenaEnvironment:
        """Without the wrappers that make one long text of all observations; those of actions stay."""
        with _ONE_AT_A_TIME:
            game = self._library.make(self._game.id, **self._arguments)
        while isinstance(game, self._library.Wrapper):
            game = game.env
        for wrapper in self._game.default_wrappers or []:
            if issubclass(wrapper, self._library.ActionWrapper):
                game = wrapper(game)
        return TextArenaEnvironment(game, self._library, *self._seats)


class TextArenaEnvironment:
    """One game after another."""

    def __init__(self, game: Any, library: Any, players: int, player: int, opponent: Opponent | None) -> None:
        self._game, self._library = game, library
        self._players, self._player, self._opponent = players, player, opponent

    def reset(self, row: Mapping[str, Any], seed: int) -> Observation:
        self._chance, self._others_chance = random.Random(seed), random.Random(seed + 1)
        self._said = {player: "" for player in range(self._players)}
        with self._own_chance():
            try:
                self._game.reset(num_players=self._players, seed=seed)
            except AssertionError as error:
                raise ValueError(f"players is {self._players}: {error}") from error
        self._let_others_move()
        return after_prompt(row["prompt"], f"\n{self._listen()}")

    def step(self, completion: str) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        with self._own_chance():
            done, _ = self._game.step(completion)
        done = done or self._let_others_move()
        if not done:
            return f"\n{self._listen()}", 0.0, False, False, {}
        rewards, info = self._game.close()
        return None, float(rewards[self._player]), True, False, info[self._player]

    def _let_others_move(self) -> bool:
        """Until it is the policy's turn. Returns whether the game is over."""
        done = False
        while not done and self._game.state.current_player_id != self._player:
            self._listen()
            move = self._opponent(self._said[self._game.state.current_player_id], self._others_chance)
            with self._own_chance():
                done, _ = self._game.step(move)
        return done

    def _listen(self) -> str:
        """What the player whose turn it is has been told since its last, but for its own words."""
        player, messages = self._game.get_observation()
        names = self._game.state.role_mapping
        new = "".join(f"[{names.get(sender, sender)}] {text}\n" for sender, text, _ in messages if sender != player)
        self._said[player] += new
        return new

    @contextmanager
    def _own_chance(self) -> Iterator[None]:
        """Python's random numbers are this game's own."""
        with _ONE_AT_A_TIME:
            others = random.getstate()
            random.setstate(self._chance.getstate())
            try:
                yield
            finally:
                self._chance.setstate(random.getstate())
                random.setstate(others)
