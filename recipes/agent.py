"""The agent of recipes/agent.yaml: it solves a problem, has its solution checked, and is paid for the answer that comes of it."""

from __future__ import annotations

from openai import AsyncOpenAI

from fastppo.rewards import gsm8k

SOLVE = "Solve the problem step by step."
CHECK = "Check each step of this solution, and give the right answer after ####."


async def solve(row, base_url, api_key):
    async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        messages = [{"role": "user", "content": f"{row['question']}\n{SOLVE}"}]
        for request in (CHECK, None):
            answer = await client.chat.completions.create(model="policy", messages=messages)
            said = answer.choices[0].message
            messages += [said, {"role": "user", "content": request}]
    return gsm8k([said.content], [row["answer"]])[0]
