"""Compiles what outputs must be in a thread of its own, so that no step waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from bucketserve.engine.grammars import GrammarTokenizer, Matcher
from bucketserve.engine.sequences import EngineSequence

__all__ = ["GrammarCompiler"]

WAIT_S = 0.05
"""Most time for which an engine that has nothing else to do waits."""


class GrammarCompiler:
    """The sequences whose matchers are being made. Owned by the engine's thread."""

    def __init__(self, tokenizer: GrammarTokenizer) -> None:
        """Starts its thread when first needed."""
        self._tokenizer = tokenizer
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._open: dict[EngineSequence, Future[Matcher]] = {}

    def begin(self, sequence: EngineSequence) -> None:
        """Has a sequence's matcher made, from the tokens that it has generated."""
        spec = sequence.spec
        assert spec.structured_output is not None
        num_prompt = len(spec.token_ids) - spec.num_resumed_tokens
        generated = sequence.tokens[num_prompt:]
        self._open[sequence] = self._pool.submit(self._tokenizer.matcher, spec.structured_output, generated)

    def forget(self, sequence: EngineSequence) -> None:
        """Does not make it, if it was to be made."""
        if (future := self._open.pop(sequence, None)) is not None:
            future.cancel()

    def done(self) -> Iterator[tuple[EngineSequence, str]]:
        """Gives the sequences their matchers that are made; yields those that get none, and why."""
        for sequence in [sequence for sequence, future in self._open.items() if future.done()]:
            future = self._open.pop(sequence)
            # Whatever it is: what one sequence asks for must not end the engine.
            if (error := future.exception()) is None:
                sequence.matcher = future.result()
            else:
                yield sequence, f"its output can't be constrained as it asks: {error}"

    def wait(self) -> None:
        """Returns when one is made, or after a while."""
        wait(self._open.values(), WAIT_S, FIRST_COMPLETED)

    def close(self) -> None:
        """Ends the thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)
