"""What the drivers need from outside, as protocols: the queue's store and the engine.

Adapters live in bucketserve.store and bucketserve.engine; composition roots (app.py of each service) choose them.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from bucketserve.core.errors import EngineError
from bucketserve.core.types import BatchId, FinishReason, Headroom, RequestId, StepSample, WorkerId

__all__ = [
    "UNKNOWN_TOKEN",
    "Adapter",
    "Admit",
    "Dispatch",
    "Engine",
    "EngineInfo",
    "Leadership",
    "Logprob",
    "Place",
    "QueueStore",
    "Remove",
    "Sampling",
    "SequenceFailure",
    "SequenceSpec",
    "SetEdges",
    "SetOutputs",
    "StepOutput",
    "StoreSnapshot",
    "StoredTicket",
    "StructureKind",
    "StructuredOutput",
    "TokenLogprobs",
    "TokenOutput",
    "Write",
]


# --- store ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Admit:
    """Adds a waiting ticket. Writing the same id again changes nothing, and nothing either once it is at a worker."""

    request_id: RequestId
    prefill_tokens: int
    ticket: bytes
    """The serialised ticket; opaque to the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """Notes that waiting tickets are at a worker; those that do not wait, or are gone, stay as they are."""

    worker_id: WorkerId
    batch_id: BatchId
    request_ids: tuple[RequestId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Notes that a ticket is at a worker, wherever it was before. No effect on an unknown one."""

    request_id: RequestId
    worker_id: WorkerId
    batch_id: BatchId


@dataclass(frozen=True, slots=True, kw_only=True)
class Remove:
    """Forgets tickets, waiting or at a worker: finished, cancelled, expired or lost."""

    request_ids: tuple[RequestId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SetEdges:
    """Replaces the bucket edges.

    A ticket's bucket follows from its length and the edges, so that no ticket moves and none can be lost on the way.
    """

    edges: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SetOutputs:
    """Replaces these parts of what is known of output lengths; the others stay as they are."""

    counts: Mapping[str, tuple[int, ...]]


Write = Admit | Dispatch | Place | Remove | SetEdges | SetOutputs


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTicket:
    """A ticket as read back."""

    request_id: RequestId
    ticket: bytes
    worker_id: WorkerId | None
    """The worker that it is at; None while it waits."""
    batch_id: BatchId | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSnapshot:
    """Everything that is stored for a model."""

    edges: tuple[int, ...]
    outputs: Mapping[str, tuple[int, ...]]
    """What is known of output lengths, by part (SetOutputs)."""
    tickets: tuple[StoredTicket, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Leadership:
    """The right to write for a model, until the time to live ends without renewal."""

    owner: str
    epoch: int
    """Fencing token: grows with each change of leader; writes under an older one are refused."""


class QueueStore(Protocol):
    """Durable state of one model's queue. Every method is atomic and safe to repeat."""

    async def lead(self, owner: str, ttl_s: float, epoch: int = 0) -> Leadership | None:
        """Renews the leadership of that epoch, or takes it under a new one; None while someone else holds it.

        Raises:
            UnavailableError: the store can't be reached.
        """

    async def resign(self, leadership: Leadership) -> None:
        """Gives the leadership up if it is still held."""

    async def load(self, leadership: Leadership) -> StoreSnapshot:
        """Returns all that is stored.

        Raises:
            StaleEpochError: someone else leads.
            UnavailableError: the store can't be reached.
        """

    async def apply(self, leadership: Leadership, writes: Sequence[Write]) -> Sequence[frozenset[RequestId]]:
        """Performs the writes in order, in one round trip; for each one returns the ids on which it took effect.

        An Admit for which the store has no room takes no effect; removals always work.

        Raises:
            StaleEpochError: someone else leads; none of the writes after the first refused one took effect.
            UnavailableError: the store can't be reached or can't write; repeat the call.
        """

    async def risk(self) -> str:
        """Returns what in the server's settings may lose what is stored; empty if nothing is known to.

        Raises:
            UnavailableError: the store can't be reached.
        """

    async def close(self) -> None:
        """Gives up connections."""


# --- engine ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen; see SamplingParams in protos/bucketserve/v1/common.proto for ranges."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids, each once, and what is added to their logits."""
    seed: int = 0


class StructureKind(enum.Enum):
    """What a StructuredOutput's text is; see protos/bucketserve/v1/common.proto."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICES = "choices"
    """A JSON array of texts."""
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """What an output must be."""

    kind: StructureKind
    text: str


UNKNOWN_TOKEN = "the prompt has a token that is not in the model's vocabulary"
"""Why an engine gives a sequence up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSpec:
    """A request as the engine runs it."""

    request_id: RequestId
    token_ids: tuple[int, ...]
    """Prompt, then tokens that earlier attempts generated."""
    max_new_tokens: int
    num_resumed_tokens: int = 0
    """How many of token_ids were generated: output position 0 of this attempt is generated position that many."""
    sampling: Sampling = field(default_factory=Sampling)
    structured_output: StructuredOutput | None = None
    """What the generated tokens must be, those of earlier attempts included; None: anything."""
    stop_token_ids: frozenset[int] = frozenset()
    num_logprobs: int | None = None
    batch_id: BatchId | None = None
    tpot_slo_s: float | None = None
    """Promised mean time per token after the first: no step of others' prompts is to break it."""
    hands_over: bool = False
    """Ends here with its first token, and gets no second: its KV goes elsewhere. Only its prompt takes KV."""
    is_batch: bool = False
    """Of batch class: an engine that has to let a sequence go takes these first."""
    num_preemptions: int = 0
    """How often it was let go before (Request.num_preemptions)."""
    prefix_salt: bytes = b""
    """Only sequences of the same salt use each other's KV."""
    adapter: str = ""
    """Fingerprint of the adapter that computes it; empty: the model alone."""

    @property
    def reserved_tokens(self) -> int:
        """KV tokens that it needs at most: one that is handed over grows elsewhere."""
        return len(self.token_ids) + (0 if self.hands_over else self.max_new_tokens)

    def check(self, most_tokens: int) -> None:
        """Raises EngineError if it could never run where a sequence has at most so many tokens, or would never end."""
        if not self.token_ids or self.max_new_tokens < 1:
            raise EngineError("a sequence has a prompt, and at least one token to generate")
        if self.reserved_tokens > most_tokens:
            raise EngineError(f"{self.reserved_tokens} tokens can never fit: the context is {most_tokens} tokens here")

    def is_known(self, vocabulary: int, generated: Sequence[int] = ()) -> bool:
        """Returns whether a model of so many tokens has all of the sequence's, and those generated since.

        One that it has not ends the step for all sequences, and on a GPU the process.
        """
        tokens = (*self.token_ids, *generated)
        return min(tokens) >= 0 and max(tokens) < vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter (LoRA): small weights beside those of a model."""

    fingerprint: str
    directory: Path
    """As peft writes it: adapter_config.json and adapter_model.safetensors."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token and the natural logarithm of its probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, from the model's distribution before temperature and filters."""

    chosen: Logprob
    top: tuple[Logprob, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOutput:
    """One new token of one sequence, or its end."""

    request_id: RequestId
    token_id: int | None
    """None when the sequence ended on a stop token, which is not part of the output."""
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    """Set with the sequence's last output: LENGTH, or STOP after a stop token or when nothing more may follow.

    The engine has then freed its KV.
    """
    matched_stop_token_id: int | None = None
    cached_prompt_tokens: int = 0
    """Tokens of the sequence's prompt whose KV this engine did not have to compute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceFailure:
    """A sequence that the engine gave up; its KV is free again."""

    request_id: RequestId
    message: str
    is_retryable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """What one forward pass brought."""

    tokens: tuple[TokenOutput, ...] = ()
    """None, one or several of each sequence, in the order of its output; nothing of one follows its end."""
    prefilled: tuple[RequestId, ...] = ()
    """Sequences whose prompt was completed by this step (their first token is among tokens)."""
    failures: tuple[SequenceFailure, ...] = ()
    preempted: tuple[RequestId, ...] = ()
    """Sequences that the engine let go before the step, to have KV for the others; theirs is free again."""
    sample: StepSample | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What an engine is."""

    name: str
    device: str
    dtype: str
    context_tokens: int
    kv_bytes_per_token: int
    kv_layout: str
    """Number type and shape of the KV of a token; engines whose layouts agree may exchange KV. Empty: it hands none
    over and takes none, and refuses sequences with hands_over set."""
    kv_kept_s: float = 0.0
    """For how long what it hands over by a handle is sure to be there; 0: until it is fetched."""
    fingerprint: str
    """Weights, configuration, number type and kind of engine: engines with the same one compute the same."""
    tokenizer: str = ""
    """Fingerprint of what its token ids mean; empty if it does not know."""
    kv_page_tokens: int = 1
    """Tokens of a page, in which KV is found again, handed over as bytes and checked."""
    step_tokens: int = 0
    """Prompt tokens of a step at most; 0: it does not say."""
    has_grammars: bool = False
    """Whether it takes sequences with a structured_output."""
    max_adapters: int = 0
    """How many adapters it can have at once; 0: it can have none."""

    @property
    def kv_page_bytes(self) -> int:
        """Bytes of a whole page's KV, all layers."""
        return self.kv_page_tokens * self.kv_bytes_per_token


class Engine(Protocol):
    """A model on a device. Not thread-safe: one thread owns it and calls everything.

    Sequences take KV as they use it; when it runs out, some are let go (core/preemption.py, StepOutput.preempted).
    """

    @property
    def info(self) -> EngineInfo:
        """What it is."""

    def headroom(self) -> Headroom:
        """Memory and slots free now; last_assignment is 0 (the worker fills it in)."""

    def add(self, sequences: Sequence[SequenceSpec], max_chunk_tokens: int = 0) -> None:
        """Queues sequences for prefill; they begin in order, as memory allows.

        Args:
            sequences: a batch, to be prefilled together.
            max_chunk_tokens: most prompt tokens per step while other sequences decode; 0 for no limit.

        Raises:
            EngineError: a sequence could never fit (context or total KV), has no prompt or nothing to generate, its id
                is here already, or its output can't be constrained here; none was added.
            NoAdapterError: a sequence's adapter is not here; none was added.
        """

    def hand_over(self, request_id: RequestId) -> bytes | None:
        """Forgets a prefilled sequence whose KV another engine fetches by means of their own; returns a handle of it.

        The KV stays in this engine's memory, and counts there, until it has been fetched or this engine gives it up.

        Args:
            request_id: a sequence with hands_over set, named in `prefilled` by the last step and not finished by it.

        Returns:
            What take_over of an engine with the same kv_layout understands; None if this engine's KV goes as bytes
            (export_kv), and the sequence is still here.

        Raises:
            EngineError: there is no such sequence.
        """

    def take_over(self, spec: SequenceSpec, generated: Sequence[int], handle: bytes) -> None:
        """Adds a sequence whose KV another engine has; it decodes once its KV is here, which may take empty steps.

        KV that can't be had, or is not this prompt's, is a failure of a later step, retryable; or the prompt is
        computed here.

        Args:
            spec: as it was given to the engine that prefilled it, with hands_over unset.
            generated: the token that engine generated, which has no KV yet.
            handle: what hand_over returned.

        Raises:
            EngineError: there is no room, the handle is none or another prompt's, or the id is here already.
            NoAdapterError: the sequence's adapter is not here.
        """

    def export_kv(self, request_id: RequestId, into: memoryview) -> None:
        """Copies a prefilled sequence's KV out and forgets the sequence.

        Args:
            request_id: a sequence with hands_over set, named in `prefilled` by the last step and not finished by it.
            into: num_prompt_tokens x kv_bytes_per_token bytes, page after page, each in the engine's own order; the
                last one may have fewer tokens.

        Raises:
            EngineError: there is no such sequence, the length does not match, or it can't be copied.
        """

    def known_pages(self, token_ids: Sequence[int], salt: bytes) -> int:
        """Returns of how many leading pages of a prompt of that salt the KV is here, so that it need not come.

        Any thread may call it, beside a step as well: nothing is set aside, and what is here now may be given up before
        import_kv, which will say so.
        """

    def import_kv(self, spec: SequenceSpec, generated: Sequence[int], kv: memoryview) -> None:
        """Adds a sequence whose KV was computed elsewhere; it decodes from the next step on.

        Args:
            spec: as it was given to the engine that prefilled it, with hands_over unset.
            generated: the tokens that engine generated; the last one has no KV yet.
            kv: what export_kv wrote, or its end, if leading pages are here. It is copied.

        Raises:
            KvGoneError: not all of those pages are here any more.
            EngineError: there is no room, the length does not match, or the id is here already.
        """

    def cancel(self, request_ids: Sequence[RequestId]) -> None:
        """Forgets sequences and frees their KV; unknown ids are ignored."""

    def load_adapter(self, adapter: Adapter) -> None:
        """Loads an adapter; no effect if it is here.

        Raises:
            EngineError: it can't be served, or as many are here as there may be; says why. All others go on.
        """

    def unload_adapter(self, fingerprint: str) -> bool:
        """Forgets an adapter, unless a sequence here uses it; returns whether it is gone.

        Raises:
            EngineError: it can't be forgotten now, and is here still; says why.
        """

    def step(self) -> StepOutput:
        """Runs one forward pass over what is queued and running; returns at once, empty, if there is nothing."""

    def has_work(self) -> bool:
        """Whether step would do anything."""

    def close(self) -> None:
        """Frees the device."""
