"""Measures hf-clm serve under load: 50 concurrent clients that each repeat a different question.

    python tests/benchmarks/serve.py [--clients 50] [--rounds 4] [--batch_size 1 8]

A tiny Qwen2 learns 50 answers by heart first, so that every reply can be checked: a lost or mixed-up one ends
it. Half of the clients stream. The model costs little, so this measures the server, and what batches save.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

import openai

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, not by pytest

from by_heart import learn_by_heart
from served import Server, served

SQUARES = {f"{n} squared": f"{n} times {n} is {n * n}" for n in range(50)}


async def ask(api: openai.AsyncOpenAI, question: str, *, stream: bool) -> float:
    """Sends a question and checks the answer; returns the seconds."""
    started = time.perf_counter()
    messages = [{"role": "user", "content": question}]
    reply = await api.chat.completions.create(model="squares", messages=messages, stream=stream)
    if stream:
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in reply])
    else:
        text = reply.choices[0].message.content
    assert text == SQUARES[question], f"{question!r} got {text!r}"
    return time.perf_counter() - started


async def load(server: Server, *, clients: int, rounds: int) -> list[float]:
    """Returns the seconds of every request; each client sends ``rounds`` questions in sequence."""
    questions = list(SQUARES)

    async def client(number: int) -> list[float]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as api:
            return [
                await ask(api, questions[(number + turn) % len(questions)], stream=number % 2 == 0)
                for turn in range(rounds)
            ]

    found = await asyncio.gather(*(client(number) for number in range(clients)))
    return sorted(seconds for one in found for seconds in one)


def main() -> None:
    """Prints a line for each batch size."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1, 8])
    options = parser.parse_args()
    records = [{"instruct": question, "label": answer} for question, answer in SQUARES.items()]
    with tempfile.TemporaryDirectory() as folder:
        run = learn_by_heart(
            Path(folder), records, format="instruct", steps=350, learning_rate=3e-3, hidden_size=128
        )
        for size in options.batch_size:
            words = ["--name", "squares", "--batch_size", str(size), "--max_waiting", str(options.clients)]
            with served(run, *words) as server:
                asyncio.run(load(server, clients=1, rounds=2))
                started = time.perf_counter()
                times = asyncio.run(load(server, clients=options.clients, rounds=options.rounds))
                seconds = time.perf_counter() - started
            print(
                f"batch_size {size}: {len(times)} requests of {options.clients} clients in {seconds:.1f} s, "
                f"{len(times) / seconds:.0f} a second; median {times[len(times) // 2]:.2f} s, "
                f"slowest {times[-1]:.2f} s; every answer right",
                flush=True,
            )


if __name__ == "__main__":
    main()
