"""How much KV a worker's sequences will need at most, where they take it as they use it.

Every sequence that decodes takes one token per step of its worker. So its KV is a line over the worker's steps that
ends where its output is likely to, and the peak of their sum lies at one of these ends (LightLLM's Past-Future
scheduler, arXiv 2507.10150, the sum over those that end later, there sorted by what is left).
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection
from dataclasses import dataclass

from bucketserve.core.outputs import OutputBook
from bucketserve.core.types import Request, RequestId

__all__ = ["KvBook"]


@dataclass(slots=True, eq=False)
class _Line:
    request: Request
    join_step: int
    """The worker's step at which it had generated nothing."""
    end_step: int
    """The step at which its output is likely to end."""


class KvBook:
    """The sequences at one worker."""

    def __init__(self, outputs: OutputBook) -> None:
        """Starts empty."""
        self._outputs = outputs
        self._lines: list[_Line] = []
        """Those that may still grow, the first to end first."""
        self._by_id: dict[RequestId, _Line | int] = {}
        """Each sequence: its line, or the KV tokens that it holds whatever comes."""
        self._fixed_tokens = 0
        self._step = 0
        self._peak: int | None = 0

    def __contains__(self, request_id: RequestId) -> bool:
        """Whether a sequence is in it."""
        return request_id in self._by_id

    def at_step(self, step: int) -> None:
        """Takes the worker's number of steps with decodes."""
        self._step = step
        if self._lines and self._lines[0].end_step <= step:
            self._peak = None

    def add(self, request: Request) -> None:
        """Takes a sequence whose output begins about now."""
        self.remove(request.request_id)
        if not request.may_be_preempted:
            self.hold(request, request.reserved_tokens)
            return
        line = _Line(request, self._step, self._step + self._outputs.expected(request))
        self._by_id[request.request_id] = line
        self._insert(line)

    def hold(self, request: Request, tokens: int) -> None:
        """Takes a sequence that holds so much whatever comes."""
        self.remove(request.request_id)
        self._by_id[request.request_id] = tokens
        self._fixed_tokens += tokens
        self._peak = None

    def begins(self, request_id: RequestId) -> None:
        """Notes that a sequence's output begins only now."""
        line = self._by_id.get(request_id)
        if isinstance(line, _Line) and line.join_step != self._step:
            self._lines.remove(line)
            line.end_step += self._step - line.join_step
            line.join_step = self._step
            self._insert(line)

    def remove(self, request_id: RequestId) -> None:
        """Forgets a sequence."""
        line = self._by_id.pop(request_id, None)
        if isinstance(line, _Line):
            self._lines.remove(line)
        elif line is not None:
            self._fixed_tokens -= line
        self._peak = None

    def tokens(self, request_id: RequestId) -> int:
        """Returns the KV tokens of a sequence; 0 if it is not here."""
        line = self._by_id.get(request_id, 0)
        if isinstance(line, _Line):
            return line.request.prompt_tokens + self._step - line.join_step
        return line

    def peak(self, without: Collection[RequestId] = ()) -> int:
        """Returns the most KV tokens that they are likely to need together, from now on.

        Args:
            without: sequences that are taken to have left.
        """
        if self._peak is None:
            self._lengthen()
            self._peak = self._fixed_tokens + self._highest(())
        if not without:
            return self._peak
        known = (self._by_id.get(request_id) for request_id in without)
        return self._fixed_tokens - sum(one for one in known if isinstance(one, int)) + self._highest(without)

    def _insert(self, line: _Line) -> None:
        insort(self._lines, line, key=_end_step)
        self._peak = None

    def _lengthen(self) -> None:
        """Gives those that are longer than was likely the end that is likely now."""
        while self._lines and self._lines[0].end_step <= self._step:
            line = self._lines.pop(0)
            generated = self._step - line.join_step
            # One that may generate no more is about to be reported as ended.
            line.end_step = max(line.join_step + self._outputs.expected(line.request, generated), self._step + 1)
            insort(self._lines, line, key=_end_step)

    def _highest(self, without: Collection[RequestId]) -> int:
        # Asked after nearly every event, over all that decode at a worker: no generator, no call of max.
        highest = base = number = 0
        for line in reversed(self._lines):
            if without and line.request.request_id in without:
                continue
            number += 1
            base += line.request.prompt_tokens - line.join_step
            tokens = base + number * line.end_step
            if tokens > highest:  # noqa: PLR1730
                highest = tokens
        return highest


def _end_step(line: _Line) -> int:
    return line.end_step
