"""What a request must yield: the fake engine's tokens, computed here, away from everything that can fail."""

from __future__ import annotations

from bucketserve.core.types import RequestId
from bucketserve.engine.fake import FakeEngine
from bucketserve.ports import Sampling, SequenceSpec

__all__ = ["expected_tokens"]


def expected_tokens(prompt: list[int], max_tokens: int, temperature: float, seed: int) -> list[int]:
    """Returns the output for these parameters."""
    engine = FakeEngine()
    name = RequestId("r")
    sampling = Sampling(temperature=temperature, seed=seed)
    engine.add([SequenceSpec(request_id=name, token_ids=tuple(prompt), max_new_tokens=max_tokens, sampling=sampling)])
    tokens: list[int] = []
    while engine.has_work():
        tokens += [token.token_id for token in engine.step().tokens if token.token_id is not None]
    return tokens
