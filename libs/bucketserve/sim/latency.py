"""How long a simulated step takes, and how much KV a worker holds: coefficients from a data file.

The form is DistServe's (arXiv 2401.09670; LLMServe/DistServe@82831f1, simdistserve):

    prefill = a + b * sum(len) + c * sum(len^2)        decode step = a + b * sum(context) + c * sequences

A step that does both reads the weights once, so it costs the larger of the two fixed parts and the sum of the others.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from bucketserve.sim.errors import SimulationError
from bucketserve.sim.roofline import DERIVED

__all__ = ["CostMode", "DeviceModel", "StepLatency", "load_device", "parse_device", "prefill_cost"]


class CostMode(enum.Enum):
    """What a step with prompts of different lengths costs."""

    PADDED = "padded"
    """Every prompt of a step is computed at the length of the longest. Decode attention is paged, as in vLLM."""
    PACKED = "packed"
    """Variable-length kernels: only real tokens cost."""


def prefill_cost(spans: Sequence[tuple[int, int]], cost: CostMode) -> tuple[int, int]:
    """Returns (tokens, sum of end^2 - start^2) that a step computes of prompts, each (start, number of tokens)."""
    tokens = [number for _, number in spans]
    squares = [number * (number + 2 * start) for start, number in spans]
    if cost is CostMode.PADDED:
        return max(tokens) * len(spans), max(squares) * len(spans)
    return sum(tokens), sum(squares)


@dataclass(frozen=True, slots=True)
class StepLatency:
    """Seconds of one forward pass of one worker."""

    prefill_a_s: float
    prefill_b_s: float
    """Per prompt token."""
    prefill_c_s: float
    """Per squared prompt token."""
    decode: tuple[tuple[int, float, float, float], ...]
    """(from this many sequences on, fixed, per context token, per sequence), ascending; the first starts at 0."""

    def decode_terms(self, num_sequences: int) -> tuple[float, float, float]:
        """Returns (fixed, per context token, per sequence) for a batch of that size, in seconds."""
        found = self.decode[0]
        for terms in self.decode[1:]:
            if num_sequences >= terms[0]:
                found = terms
        return found[1:]

    def step_s(self, prefill_tokens: int, prefill_squares: int, num_decoding: int, context_tokens: int) -> float:
        """Returns the duration of a step.

        Args:
            prefill_tokens: prompt tokens computed.
            prefill_squares: sum over prompts of (end^2 - start^2) of the piece computed; len^2 for a whole prompt.
            num_decoding: sequences that decode one token each.
            context_tokens: sum of their contexts.
        """
        fixed = rest = 0.0
        if prefill_tokens:
            fixed = self.prefill_a_s
            rest = self.prefill_b_s * prefill_tokens + self.prefill_c_s * prefill_squares
        if num_decoding:
            a, b, c = self.decode_terms(num_decoding)
            fixed = max(fixed, a)
            rest += b * context_tokens + c * num_decoding
        return fixed + rest

    def prefill_s(self, num_tokens: int) -> float:
        """Returns the duration of one prompt alone."""
        return self.step_s(num_tokens, num_tokens * num_tokens, 0, 0)

    def decode_run_s(self, num_steps: int, num_decoding: int, context_tokens: int) -> float:
        """Returns the duration of so many steps in a row with the same sequences, each growing by a token a step."""
        a, b, c = self.decode_terms(num_decoding)
        first_s = a + b * context_tokens + c * num_decoding
        return num_steps * first_s + b * num_decoding * (num_steps * (num_steps - 1) / 2)

    def decode_steps_until(self, elapsed_s: float, num_decoding: int, context_tokens: int) -> int:
        """Returns the least number of whole steps of such a run that take at least elapsed_s; at least 1."""
        a, b, c = self.decode_terms(num_decoding)
        first_s, growth_s = a + b * context_tokens + c * num_decoding, b * num_decoding
        linear = first_s - growth_s / 2
        if growth_s > 0:
            steps = (-linear + math.sqrt(linear * linear + 2 * growth_s * elapsed_s)) / growth_s
        else:
            steps = elapsed_s / first_s
        # The closed form may be a hair off at a boundary; the run itself decides.
        whole = max(int(steps) - 1, 1)
        while self.decode_run_s(whole, num_decoding, context_tokens) < elapsed_s - 1e-9:
            whole += 1
        return whole


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceModel:
    """A model on a kind of device, at each degree of tensor parallelism that was measured."""

    name: str
    source: str
    context_tokens: int
    kv_bytes_per_token: int
    latency: Mapping[int, StepLatency]
    """By devices per worker."""
    kv_total_tokens: Mapping[int, int]
    """By devices per worker."""
    kv_link_bytes_per_s: float
    kv_link_latency_s: float

    def alone_s(self, prompt_tokens: int, output_tokens: int) -> float:
        """Returns how long a request takes that has one device to itself, in seconds."""
        latency = self.latency[min(self.latency)]
        first_s = latency.prefill_s(prompt_tokens)
        return first_s + latency.decode_run_s(output_tokens - 1, 1, prompt_tokens + 1)

    def kv_transfer_s(self, num_tokens: int) -> float:
        """Returns how long the KV of that many tokens takes from worker to worker."""
        return self.kv_link_latency_s + num_tokens * self.kv_bytes_per_token / self.kv_link_bytes_per_s


def load_device(name_or_path: str) -> DeviceModel:
    """Returns a model by the name of a packaged data file or of a derived one (sim/roofline.py), or from a JSON file.

    Raises:
        SimulationError: there is no such model, or the file isn't one; names the packaged ones.
    """
    if name_or_path in DERIVED:
        return parse_device(DERIVED[name_or_path])
    folder = resources.files("bucketserve.sim") / "data"
    packaged = folder / f"{name_or_path}.json"
    path = Path(name_or_path)
    if packaged.is_file():
        text = packaged.read_text(encoding="utf-8")
    elif path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        names = sorted([*DERIVED, *(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".json"))])
        known = ", ".join(name for name in names if name != "workloads")
        raise SimulationError(f"no device model {name_or_path!r}: give a JSON file or one of {known}")
    try:
        return parse_device(json.loads(text))
    except (KeyError, TypeError, ValueError) as error:
        raise SimulationError(f"{name_or_path}: not a device model: {error!r}") from error


def parse_device(data: Mapping[str, object]) -> DeviceModel:
    """Returns the model that a data file describes. See data/a100-40gb-13b.json for the fields."""
    raw: Any = data
    unit_s = {"ms": 1e-3, "s": 1.0}[raw["coefficients_unit"]]
    scale, memory, link = raw["scale"], raw["memory"], raw["kv_link"]
    latency: dict[int, StepLatency] = {}
    kv_total: dict[int, int] = {}
    for key, entry in raw["parallel"].items():
        devices = int(key)
        a, b, c = entry["prefill"]
        latency[devices] = StepLatency(
            prefill_a_s=a * unit_s * scale["prefill_fixed"],
            prefill_b_s=b * unit_s * scale["prefill_variable"],
            prefill_c_s=c * unit_s * scale["prefill_variable"],
            decode=tuple(
                (int(start), *(float(value) * unit_s * scale["decode"] for value in (fixed, context, sequence)))
                for start, fixed, context, sequence in entry["decode"]
            ),
        )
        kv_total[devices] = int(entry.get("kv_total_tokens") or _kv_tokens(devices, memory))
    return DeviceModel(
        name=raw["name"],
        source=raw["source"],
        context_tokens=int(raw["context_tokens"]),
        kv_bytes_per_token=int(memory["kv_bytes_per_token"]),
        latency=latency,
        kv_total_tokens=kv_total,
        kv_link_bytes_per_s=float(link["bytes_per_s"]),
        kv_link_latency_s=float(link["latency_s"]),
    )


def _kv_tokens(devices: int, memory: Mapping[str, float]) -> int:
    """KV tokens in what usable memory leaves beside weights (shared by the worker's devices) and the rest (on each)."""
    usable = devices * (memory["device_bytes"] * memory["usable_share"] - memory["other_bytes_per_device"])
    return int((usable - memory["weights_bytes"]) / memory["kv_bytes_per_token"])
