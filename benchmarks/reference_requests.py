"""The requests of the benchmarks: those of a file, or drawn like the reference work's."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

LONG_TOKENS = 256
"""Prompts from here on are long."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and the exact number of tokens wanted."""

    prompt_ids: list[int]
    output_tokens: int

    @property
    def kind(self) -> str:
        """Returns short or long."""
        return "short" if len(self.prompt_ids) < LONG_TOKENS else "long"


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
    """Writes the file that read_requests reads; returns its path."""
    rows = [{"prompt_ids": request.prompt_ids, "output_len": request.output_tokens} for request in requests]
    path.write_text(json.dumps({"requests": rows}), encoding="utf-8")
    return path
