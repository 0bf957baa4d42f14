"""Open-loop arrivals, and a client of vLLM's OpenAI server that runs in vLLM's own virtual environment.

Driven by benchmarks/arrivals.py through pipes: for each JSON line on standard input, a list of arrivals with at_s,
prompt_ids, output_tokens, max_tokens and stop_token_ids, it sends them and prints a JSON line with what each felt.
arrivals.py uses the same open_loop for BucketServe. Nothing of BucketServe is imported here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(slots=True)
class Outcome:
    """What the client of a request felt. Times are of time.perf_counter."""

    sent_s: float
    first_s: float | None = None
    last_s: float | None = None
    output_tokens: int = 0
    error: str = ""

    def came(self, tokens: int) -> None:
        """Notes tokens that came now."""
        if tokens > 0:
            self.last_s = time.perf_counter()
            if self.first_s is None:
                self.first_s = self.last_s
            self.output_tokens += tokens


async def open_loop(at_s: Sequence[float], send: Callable[[int], Awaitable[Outcome]]) -> tuple[list[Outcome], float]:
    """Sends request i at at_s[i], whatever became of the others.

    Returns what they felt, times from the start, and the seconds until the last end.
    """
    start_s = time.perf_counter()

    async def one(index: int) -> Outcome:
        await asyncio.sleep(max(start_s + at_s[index] - time.perf_counter(), 0.0))
        outcome = await send(index)
        outcome.sent_s -= start_s
        if outcome.first_s is not None and outcome.last_s is not None:
            outcome.first_s -= start_s
            outcome.last_s -= start_s
        return outcome

    outcomes = await asyncio.gather(*(one(index) for index in range(len(at_s))))
    return list(outcomes), time.perf_counter() - start_s


async def send_http(session: Any, url: str, model: str, arrival: dict[str, Any]) -> Outcome:
    """Sends a completion of token ids, streamed; tokens are counted by the usage that comes with every event."""
    outcome = Outcome(sent_s=time.perf_counter())
    body = {
        "model": model,
        "prompt": arrival["prompt_ids"],
        "max_tokens": arrival["max_tokens"],
        "stop_token_ids": arrival["stop_token_ids"],
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    try:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            if response.status != 200:
                outcome.error = f"HTTP {response.status}: {(await response.text())[:200]}"
                return outcome
            async for line in response.content:
                content = line.strip()
                if not content.startswith(b"data:") or content == b"data: [DONE]":
                    continue
                event = json.loads(content[5:])
                if "error" in event:
                    outcome.error = str(event["error"])[:200]
                    return outcome
                # The count so far: an event may bring several tokens, or none.
                outcome.came(int((event.get("usage") or {}).get("completion_tokens", 0)) - outcome.output_tokens)
    except Exception as error:
        outcome.error = repr(error)
        return outcome
    # A stop token comes, too.
    if outcome.output_tokens != arrival["output_tokens"] + bool(arrival["stop_token_ids"]):
        outcome.error = f"{outcome.output_tokens} of {arrival['output_tokens']} tokens"
    return outcome


async def run(url: str, model: str, plan: list[dict[str, Any]]) -> dict[str, Any]:
    """Sends all arrivals; returns outcomes and seconds."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        outcomes, seconds = await open_loop(
            [arrival["at_s"] for arrival in plan], lambda index: send_http(session, url, model, plan[index])
        )
    return {"outcomes": [asdict(outcome) for outcome in outcomes], "seconds": seconds}


def main() -> None:
    """Command line."""
    import uvloop

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    options = parser.parse_args()
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(uvloop.run(run(options.url, options.model, json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
