"""How many output tokens clients ask for: a limit that they choose without knowing how long the output will be."""

from __future__ import annotations

import enum
import random

__all__ = ["FLAT_TOKENS", "ROUND_TOKENS", "OutputLimits", "draw_limit"]

ROUND_TOKENS = (256, 512, 1024, 2048, 4096)
"""Round numbers that people type."""
FLAT_TOKENS = 1024
"""A client library's constant, whatever the request."""


class OutputLimits(enum.Enum):
    """Which max_new_tokens requests carry. The same for every policy."""

    CLIENT = "client"
    """Half of the requests a round number well above their output, a quarter FLAT_TOKENS, a quarter exact."""
    EXACT = "exact"
    """The true output: published benchmarks make the model ignore its end token, so that every policy knows it."""


def draw_limit(output_tokens: int, rng: random.Random) -> int:
    """Returns the limit of one request as clients send them, in tokens; never below its output.

    - 1/2: a round number, the smallest of ROUND_TOKENS that is at least twice the output or, as often, the next one up;
    - 1/4: FLAT_TOKENS;
    - 1/4: the output itself.

    Takes two numbers from rng whatever the output, so that the draws of other requests stay what they are.
    """
    kind, is_next = rng.random(), rng.random() < 0.5
    if kind >= 0.75:
        return output_tokens
    if kind >= 0.5:
        return max(FLAT_TOKENS, output_tokens)
    enough = [tokens for tokens in ROUND_TOKENS if tokens >= 2 * output_tokens] or [ROUND_TOKENS[-1]]
    return max(enough[min(int(is_next), len(enough) - 1)], output_tokens)
