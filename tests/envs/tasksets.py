"""Tasksets and environments of verifiers, as files."""

from __future__ import annotations

SINGLE = """
import verifiers.v1 as vf


class LettersConfig(vf.TasksetConfig):
    count: int = 3


class LetterData(vf.TaskData):
    answer: str


class LetterTask(vf.Task[LetterData, vf.State, vf.TaskConfig]):
    @vf.reward
    async def right(self, task, trace) -> float:
        return float(trace.last_reply == task.answer)

    @vf.reward(weight=0.5)
    async def short(self, trace) -> float:
        return float(len(trace.last_reply) <= 1)

    @vf.metric
    async def turns(self, trace) -> float:
        return trace.num_turns


class Letters(vf.Taskset[LetterTask, LettersConfig]):
    def load(self):
        for letter in "abc"[: self.config.count]:
            yield LetterTask(LetterData(prompt=f"say {letter}", answer=letter), self.config.task)


__all__ = ["Letters"]
"""
TALK = (
    SINGLE
    + """

class TalkConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig()


class Talk(vf.Env[TalkConfig]):
    async def run(self, task, agents):
        async with agents.player.interaction(task) as talk:
            segment = await talk.turn()
            while not segment.terminated and segment.last_reply != task.data.answer:
                segment = await talk.turn("no")

    async def finalize(self, task, episode):
        episode.traces[0].record_reward("first", float(episode.traces[0].num_turns == 1), 2.0)


__all__ = ["Letters", "Talk"]
"""
)
WITH_RULES = SINGLE.replace(
    "    @vf.metric",
    """    @vf.stop
    async def enough(self, trace: vf.Trace) -> bool:
        return trace.num_turns >= 2

    async def setup(self, trace) -> None:
        trace.state.artifacts["begun"] = b""

    @vf.metric""",
)
TALK_WITH_RULES = WITH_RULES + TALK[len(SINGLE) :]
NEEDS_RUNTIME = SINGLE.replace("async def right(self, task, trace)", "async def right(self, task, trace, runtime)")
TWO_SEATS = TALK.replace("player: vf", "other: vf.AgentConfig = vf.AgentConfig()\n    player: vf")
ENDLESS = SINGLE.replace("def load", "INFINITE = True\n\n    def load")
RAISES = SINGLE.replace("return float(trace.last_reply == task.answer)", "raise OSError('no judge')")
FILES = {
    "fastppo_single": SINGLE,
    "fastppo_talk": TALK,
    "fastppo_rules": TALK_WITH_RULES,
    "fastppo_runtime": NEEDS_RUNTIME,
    "fastppo_seats": TWO_SEATS,
    "fastppo_endless": ENDLESS,
    "fastppo_raises": RAISES,
}
