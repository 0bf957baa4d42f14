"""Which sequences of the packed engine wait, which decode, and what KV each of them has."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from operator import attrgetter

from bucketserve.core.preemption import SPARE_SHARE
from bucketserve.core.stepping import by_turn
from bucketserve.core.types import RequestId
from bucketserve.engine.kv_memory import PAGE_TOKENS, num_pages
from bucketserve.engine.kv_space import KvSpace, KvTable
from bucketserve.engine.sequences import EngineSequence
from bucketserve.ports import SequenceSpec

__all__ = ["SequenceTable"]


class SequenceTable:
    """A sequence waits, from some time on with KV for its prompt; then it decodes; then it is gone, with its KV."""

    def __init__(self, space: KvSpace) -> None:
        """Starts with nobody."""
        self.space = space
        self.waiting: dict[RequestId, EngineSequence] = {}
        """In the order in which they came."""
        self.running: dict[RequestId, EngineSequence] = {}
        self.num_prefix_asked = self.num_prefix_reused = 0
        """Prompt tokens so far, and those of them whose KV was there."""

    def __contains__(self, request_id: object) -> bool:
        """Whether a sequence of that name is here."""
        return request_id in self.waiting or request_id in self.running

    def __iter__(self) -> Iterator[RequestId]:
        """Yields the names of all."""
        return iter([*self.waiting, *self.running])

    @property
    def num_used_tokens(self) -> int:
        """Tokens of KV that sequences have, or are to have once they begin."""
        to_come = sum(num_pages(s.first_tokens) for s in self.waiting.values() if s.kv is None)
        return (self.space.memory.num_pages - self.space.num_free_pages + to_come) * PAGE_TOKENS

    def begun(self) -> list[EngineSequence]:
        """Returns the sequences that have KV."""
        return [*self.running.values(), *(s for s in self.waiting.values() if s.kv is not None)]

    def ready(self, max_sequences: int) -> list[EngineSequence]:
        """Returns the waiting sequences that may be computed next, in order; KV goes to those for which there is room.

        Of those that lack the same page of a common beginning one is computed, for all of them.

        max_sequences: that may decode at once; no more are ready than may join them.
        """
        places, may_begin = max_sequences - len(self.running), True
        ready: list[EngineSequence] = []
        for sequence in self.waiting.values():
            if len(ready) >= places:
                break
            if not sequence.may_run:
                continue
            may_begin = may_begin and (sequence.kv is not None or self._begin(sequence))
            if sequence.kv is not None:
                self._adopt(sequence, sequence.kv)
                ready.append(sequence)
        return self._apart(ready)

    def _begin(self, sequence: EngineSequence) -> bool:
        """Gives a sequence pages for its prompt, those that are known already among them; False if there is no room."""
        space, spec = self.space, sequence.spec
        known = space.find(spec.token_ids[: _most_reused(spec)], spec.prefix_salt)
        spare = math.ceil(space.memory.num_tokens * SPARE_SHARE) if self.begun() else 0
        if space.free_after(sequence.first_tokens, known) * PAGE_TOKENS < spare:
            return False
        sequence.kv = space.take(sequence.first_tokens, spec.prefix_salt, known)
        self.num_prefix_asked += len(spec.token_ids)
        self._count_reused(sequence, len(known) * PAGE_TOKENS)
        return True

    def _adopt(self, sequence: EngineSequence, kv: KvTable) -> None:
        """Gives a sequence what others have computed of its prompt since it began."""
        self.space.adopt(kv, sequence.tokens, _most_reused(sequence.spec))
        self._count_reused(sequence, max(kv.num_full * PAGE_TOKENS - sequence.num_cached, 0))

    def _count_reused(self, sequence: EngineSequence, num_tokens: int) -> None:
        sequence.num_cached += num_tokens
        sequence.num_reused += num_tokens
        self.num_prefix_reused += num_tokens

    def _apart(self, ready: Sequence[EngineSequence]) -> list[EngineSequence]:
        """Leaves out those that lack a page which another one of them computes."""
        computes: dict[Hashable, EngineSequence] = {}
        # So none waits for one that is not computed.
        for sequence in by_turn(ready, attrgetter("remaining")):
            if sequence.kv is not None:
                page = self.space.next_page(sequence.kv, sequence.tokens, _most_reused(sequence.spec))
                computes.setdefault(sequence if page is None else page, sequence)
        chosen = set(computes.values())
        return [sequence for sequence in ready if sequence in chosen]

    def publish(self, sequence: EngineSequence) -> None:
        """Lets others find what is computed of a sequence's prompt."""
        if sequence.kv is not None:
            self.space.publish(sequence.kv, sequence.tokens[: sequence.num_cached])

    def begin_decoding(self, sequence: EngineSequence) -> bool:
        """Takes a sequence whose prompt is computed; returns False if it decoded already."""
        if self.waiting.pop(sequence.spec.request_id, None) is None:
            return False
        self.running[sequence.spec.request_id] = sequence
        return True

    @property
    def num_missing_pages(self) -> int:
        """Pages that those that decode lack for the next step."""
        return sum(self.space.missing(s.kv, s.num_cached + 1) for s in self.running.values() if s.kv is not None)

    def grow(self) -> None:
        """Gives those that decode these pages."""
        for sequence in self.running.values():
            if sequence.kv is not None:
                self.space.grow(sequence.kv, sequence.num_cached + 1)

    def pages_that_stay(self) -> set[int]:
        """Returns the pages of those that may not be let go."""
        return {page for s in self.begun() if s.kv is not None and s.loss is None for page in s.kv.pages}

    def least_loss(self) -> RequestId:
        """Returns whom to let go first; of equals the last to begin. There has to be one that may be let go."""
        losses = {s.spec.request_id: cost for s in reversed(self.begun()) if (cost := s.loss) is not None}
        return min(losses, key=losses.__getitem__)

    def remove(self, request_id: RequestId) -> EngineSequence | None:
        """Takes a sequence out and frees its KV, which is kept for others while nobody wants the room."""
        sequence = self.waiting.pop(request_id, None) or self.running.pop(request_id, None)
        if sequence is not None and sequence.kv is not None:
            self.space.release(sequence.kv, sequence.tokens[: sequence.num_cached])
            sequence.kv = None
        return sequence

    def discard(self, request_id: RequestId) -> None:
        """Frees the KV of a sequence that is here; nobody finds anything of it from now on."""
        sequence = self.waiting.get(request_id) or self.running[request_id]
        if sequence.kv is not None:
            self.space.discard(sequence.kv)
            sequence.kv = None


def _most_reused(spec: SequenceSpec) -> int:
    """Returns how much of a prompt need not be computed: all but the last token, for its logits are wanted."""
    return len(spec.token_ids) - 1
