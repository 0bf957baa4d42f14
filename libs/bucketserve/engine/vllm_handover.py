"""What one vLLM tells another of KV that it has computed: where its connector finds it, and how it is known again.

The KV itself goes by vLLM's KV connector (kv_transfer_config): what a connector says of it (kv_transfer_params: with
NIXL the engine, its address and blocks) passes through as it is. A connector that reads what is stale, or another
prompt's, notices nothing. So the receiver computes the prompt's last token on what came, and compares the probability
of the first output token with the one that the sender saw (vllm_inside.SeededSampling).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bucketserve.core.errors import EngineError
from bucketserve.ports import SequenceSpec

__all__ = ["TO_HAND_OVER", "TRANSFER", "Handle"]

TRANSFER = "kv_transfer_params"
"""vLLM's name, in a request's extra_args, for what its connector is told."""
TO_HAND_OVER: Mapping[str, object] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""What it is told of a prompt whose KV another engine is to fetch, as vLLM's own examples do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Handle:
    """KV of a prompt."""

    source: str
    """Name of the engine that has it, drawn when it started."""
    prompt: str
    """Fingerprint of all that the KV follows from, but for the model."""
    logprob: float
    """Of the first output token, as the sender computed it: before temperature and filters."""
    params: Mapping[str, Any] | None
    """The connector's; None if it needs nothing but the prompt."""

    @classmethod
    def of(cls, spec: SequenceSpec, *, source: str, logprob: float, params: Mapping[str, Any] | None) -> Handle:
        """Returns the handle of a sequence's KV."""
        return cls(source=source, prompt=_prompt_of(spec), logprob=logprob, params=params)

    def to_bytes(self) -> bytes:
        """Returns it as it travels."""
        plain = {"source": self.source, "prompt": self.prompt, "logprob": self.logprob, "params": self.params}
        return json.dumps(plain).encode()

    @classmethod
    def for_sequence(cls, data: bytes, spec: SequenceSpec) -> Handle:
        """Returns the handle that travelled as data.

        Raises:
            EngineError: it is none, or not of this sequence's KV.
        """
        try:
            match json.loads(data):
                case {"source": str(source), "prompt": str(prompt), "logprob": float(logprob), "params": params} if (
                    math.isfinite(logprob) and (params is None or isinstance(params, dict))
                ):
                    handle = cls(source=source, prompt=prompt, logprob=logprob, params=params)
                case _:
                    raise EngineError("what came is no handle of KV")
        except (ValueError, RecursionError):
            raise EngineError("what came is no handle of KV") from None
        if handle.prompt != _prompt_of(spec):
            raise EngineError("the handle is not of this prompt's KV")
        return handle


def _prompt_of(spec: SequenceSpec) -> str:
    said = json.dumps([spec.adapter, spec.prefix_salt.hex(), spec.token_ids])
    return hashlib.sha256(said.encode()).hexdigest()
