"""The requests of the benchmarks: those of a file, or drawn like the reference work's."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

LONG_TOKENS = 256
"""Prompts from here on are long."""
VOCABULARY, CONTEXT = 4096, 2048
"""Of the reference model that counts."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and the number of tokens that its output has."""

    prompt_ids: list[int]
    output_tokens: int
    max_tokens: int | None = None
    """The limit, where the output ends before it; None: the limit ends it."""

    @property
    def kind(self) -> str:
        """Returns short or long."""
        return "short" if len(self.prompt_ids) < LONG_TOKENS else "long"

    def limited(self, max_tokens: int | None) -> Request:
        """Returns it with that limit, or what the context leaves."""
        left = CONTEXT - len(self.prompt_ids)
        return self if max_tokens is None else replace(self, max_tokens=min(max_tokens, left))

    @property
    def stop_token_ids(self) -> list[int]:
        """What ends the output where the limit does not, of the model that counts (reference_model.py)."""
        return [] if self.max_tokens is None else [(self.prompt_ids[-1] + self.output_tokens + 1) % VOCABULARY]

    def asked(self) -> dict[str, object]:
        """Returns it as a peer's process reads it."""
        return {
            "prompt_ids": self.prompt_ids,
            "output_tokens": self.output_tokens,
            "max_tokens": self.max_tokens or self.output_tokens,
            "stop_token_ids": self.stop_token_ids,
        }


def read_requests(path: Path | None) -> list[Request]:
    """Returns the requests of a JSON file with requests[] of prompt_ids and output_len; without one, 64 drawn ones."""
    if path is not None:
        rows = json.loads(path.read_text(encoding="utf-8"))["requests"]
        return [Request(row["prompt_ids"], int(row["output_len"])) for row in rows]
    rng = random.Random(1)
    requests = []
    for _ in range(64):
        length = rng.randint(400, 1500) if rng.random() < 0.3 else max(int(rng.lognormvariate(3.7, 0.6)), 1)
        requests.append(Request([rng.randrange(100, 4000) for _ in range(length)], rng.randint(16, 128)))
    return requests


def write_requests(requests: list[Request], path: Path) -> Path:
    """Writes the requests for a peer's process; returns the path."""
    path.write_text(json.dumps([request.asked() for request in requests]), encoding="utf-8")
    return path
