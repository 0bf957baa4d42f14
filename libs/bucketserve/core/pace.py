"""How many prompt tokens a step may take beside sequences that were promised a TPOT.

Each decoding sequence has a time at which its next token is due: its first token's, and one target more for each token
since. A step's prompt tokens are the most whose predicted time fits before the earliest of these, so that a sequence
which is ahead lends what it is ahead by to prompts (QoServe, arXiv 2503.22562, ASPLOS'26). Used by the engines and by
the simulator's workers.
"""

from __future__ import annotations

from collections.abc import Iterable

from bucketserve.core.step_times import StepTimes
from bucketserve.core.types import StepSample

__all__ = ["MOST_LENT", "StepPace"]

MIN_TOKENS = 16
"""Prompts get on by so many tokens in every step, whatever was promised."""
MOST_LENT = 2.0
"""Targets that one step may take where streams should not stutter."""
GROWTH = 2
"""A step takes at most so many times the prompt tokens of the largest one measured: further out nothing is known."""

DECODES_EACH = 8
"""Of steps without prompts, which are many and alike, one of so many teaches: an update takes some 10 us."""

INFINITY = float("inf")


class StepPace:
    """Learns how long steps take on this worker, and bounds those that decode beside prompts."""

    def __init__(self, most_lent: float = MOST_LENT) -> None:
        """Knows nothing of the worker. A step takes at most so many targets, however far ahead its sequences are."""
        self._most_lent = most_lent
        self._times = StepTimes()
        self._most_tokens = 0
        self._num_decodes = 0

    def learn(self, sample: StepSample) -> None:
        """Takes a measured step."""
        if not sample.prefill_tokens:
            self._num_decodes += 1
            if self._num_decodes % DECODES_EACH != 1:
                return
        self._times.learn(sample)
        self._most_tokens = max(self._most_tokens, sample.prefill_tokens)

    def prompt_tokens(
        self,
        promised: Iterable[tuple[float, float, int]],
        *,
        num_decoding: int,
        context_tokens: int,
        prompt_end: int,
        now_s: float,
    ) -> int:
        """Returns the most prompt tokens that the next step may take; 0 for no limit.

        A target that decodes alone would break asks for nothing: no chunk is small enough for it.

        Args:
            promised: of each decoding sequence with a TPOT target: the target in seconds, when its first token came,
                and how many tokens it has had since then, that one included.
            num_decoding: sequences that decode in the step.
            context_tokens: tokens that they attend to.
            prompt_end: the furthest position in any prompt that the step may reach.
            now_s: the time, on the clock of the first tokens.
        """
        decode_s = self._times.decode_s(num_decoding, context_tokens)
        step_s = INFINITY
        for tpot_s, first_s, num_tokens in promised:
            if tpot_s > decode_s:
                step_s = min(step_s, max(first_s + num_tokens * tpot_s - now_s, tpot_s), self._most_lent * tpot_s)
        if step_s == INFINITY:
            return 0
        token_s = self._times.step_s(1, prompt_end, num_decoding, context_tokens) - decode_s
        most = GROWTH * self._most_tokens
        if token_s > 0:
            most = min(most, int((step_s - decode_s) / token_s))
        return max(most, MIN_TOKENS)
