from bucketserve.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RefuseReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REFUSE_REASON_UNSPECIFIED: _ClassVar[RefuseReason]
    REFUSE_REASON_QUEUE_REQUESTS: _ClassVar[RefuseReason]
    REFUSE_REASON_QUEUE_TOKENS: _ClassVar[RefuseReason]
    REFUSE_REASON_TENANT_QUOTA: _ClassVar[RefuseReason]
    REFUSE_REASON_SLO_UNATTAINABLE: _ClassVar[RefuseReason]
    REFUSE_REASON_TOO_LARGE: _ClassVar[RefuseReason]
    REFUSE_REASON_STORE_FULL: _ClassVar[RefuseReason]
    REFUSE_REASON_OTHER_TOKENIZER: _ClassVar[RefuseReason]
    REFUSE_REASON_NO_GRAMMARS: _ClassVar[RefuseReason]
    REFUSE_REASON_NO_WORKER: _ClassVar[RefuseReason]
    REFUSE_REASON_NO_ADAPTER: _ClassVar[RefuseReason]

class DropReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DROP_REASON_UNSPECIFIED: _ClassVar[DropReason]
    DROP_REASON_DEADLINE: _ClassVar[DropReason]
    DROP_REASON_CANCELLED: _ClassVar[DropReason]
    DROP_REASON_WORKER_LOST: _ClassVar[DropReason]
    DROP_REASON_WORKER_FAILED: _ClassVar[DropReason]
    DROP_REASON_TOO_LARGE: _ClassVar[DropReason]
    DROP_REASON_INTERNAL: _ClassVar[DropReason]
    DROP_REASON_NO_LIKE_WORKER: _ClassVar[DropReason]
    DROP_REASON_NO_WORKER: _ClassVar[DropReason]
REFUSE_REASON_UNSPECIFIED: RefuseReason
REFUSE_REASON_QUEUE_REQUESTS: RefuseReason
REFUSE_REASON_QUEUE_TOKENS: RefuseReason
REFUSE_REASON_TENANT_QUOTA: RefuseReason
REFUSE_REASON_SLO_UNATTAINABLE: RefuseReason
REFUSE_REASON_TOO_LARGE: RefuseReason
REFUSE_REASON_STORE_FULL: RefuseReason
REFUSE_REASON_OTHER_TOKENIZER: RefuseReason
REFUSE_REASON_NO_GRAMMARS: RefuseReason
REFUSE_REASON_NO_WORKER: RefuseReason
REFUSE_REASON_NO_ADAPTER: RefuseReason
DROP_REASON_UNSPECIFIED: DropReason
DROP_REASON_DEADLINE: DropReason
DROP_REASON_CANCELLED: DropReason
DROP_REASON_WORKER_LOST: DropReason
DROP_REASON_WORKER_FAILED: DropReason
DROP_REASON_TOO_LARGE: DropReason
DROP_REASON_INTERNAL: DropReason
DROP_REASON_NO_LIKE_WORKER: DropReason
DROP_REASON_NO_WORKER: DropReason

class Ticket(_message.Message):
    __slots__ = ("run_id", "model", "prompt_tokens", "max_new_tokens", "request_class", "tenant", "slo", "gateway_id", "context_tokens", "is_resumed", "avoid_worker_ids", "traceparent", "tracestate", "fingerprint", "tokenizer", "num_preemptions", "needs_grammar", "adapter")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_CLASS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SLO_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IS_RESUMED_FIELD_NUMBER: _ClassVar[int]
    AVOID_WORKER_IDS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    TRACESTATE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    NEEDS_GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    model: str
    prompt_tokens: int
    max_new_tokens: int
    request_class: _common_pb2.RequestClass
    tenant: str
    slo: _common_pb2.Slo
    gateway_id: str
    context_tokens: int
    is_resumed: bool
    avoid_worker_ids: _containers.RepeatedScalarFieldContainer[str]
    traceparent: str
    tracestate: str
    fingerprint: str
    tokenizer: str
    num_preemptions: int
    needs_grammar: bool
    adapter: str
    def __init__(self, run_id: _Optional[str] = ..., model: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., request_class: _Optional[_Union[_common_pb2.RequestClass, str]] = ..., tenant: _Optional[str] = ..., slo: _Optional[_Union[_common_pb2.Slo, _Mapping]] = ..., gateway_id: _Optional[str] = ..., context_tokens: _Optional[int] = ..., is_resumed: _Optional[bool] = ..., avoid_worker_ids: _Optional[_Iterable[str]] = ..., traceparent: _Optional[str] = ..., tracestate: _Optional[str] = ..., fingerprint: _Optional[str] = ..., tokenizer: _Optional[str] = ..., num_preemptions: _Optional[int] = ..., needs_grammar: _Optional[bool] = ..., adapter: _Optional[str] = ...) -> None: ...

class RunSpec(_message.Message):
    __slots__ = ("token_ids", "num_resumed_tokens", "max_new_tokens", "sampling", "stop_token_ids", "num_logprobs", "delivery_address", "traceparent", "tracestate", "tpot_ms", "request_class", "num_preemptions", "prefix_salt", "structured_output", "adapter")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_RESUMED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    DELIVERY_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    TRACESTATE_FIELD_NUMBER: _ClassVar[int]
    TPOT_MS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_CLASS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_SALT_FIELD_NUMBER: _ClassVar[int]
    STRUCTURED_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_resumed_tokens: int
    max_new_tokens: int
    sampling: _common_pb2.SamplingParams
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_logprobs: int
    delivery_address: str
    traceparent: str
    tracestate: str
    tpot_ms: int
    request_class: _common_pb2.RequestClass
    num_preemptions: int
    prefix_salt: bytes
    structured_output: _common_pb2.StructuredOutput
    adapter: str
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., num_resumed_tokens: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., num_logprobs: _Optional[int] = ..., delivery_address: _Optional[str] = ..., traceparent: _Optional[str] = ..., tracestate: _Optional[str] = ..., tpot_ms: _Optional[int] = ..., request_class: _Optional[_Union[_common_pb2.RequestClass, str]] = ..., num_preemptions: _Optional[int] = ..., prefix_salt: _Optional[bytes] = ..., structured_output: _Optional[_Union[_common_pb2.StructuredOutput, _Mapping]] = ..., adapter: _Optional[str] = ...) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("hello", "run", "cancel")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    hello: GatewayHello
    run: SubmitRun
    cancel: CancelRun
    def __init__(self, hello: _Optional[_Union[GatewayHello, _Mapping]] = ..., run: _Optional[_Union[SubmitRun, _Mapping]] = ..., cancel: _Optional[_Union[CancelRun, _Mapping]] = ...) -> None: ...

class GatewayHello(_message.Message):
    __slots__ = ("gateway_id", "instance", "model")
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    gateway_id: str
    instance: str
    model: str
    def __init__(self, gateway_id: _Optional[str] = ..., instance: _Optional[str] = ..., model: _Optional[str] = ...) -> None: ...

class SubmitRun(_message.Message):
    __slots__ = ("ticket", "spec", "age_us", "remaining_us", "is_admitted", "block_hashes", "attempt_age_us")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    AGE_US_FIELD_NUMBER: _ClassVar[int]
    REMAINING_US_FIELD_NUMBER: _ClassVar[int]
    IS_ADMITTED_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_AGE_US_FIELD_NUMBER: _ClassVar[int]
    ticket: Ticket
    spec: bytes
    age_us: int
    remaining_us: int
    is_admitted: bool
    block_hashes: _containers.RepeatedScalarFieldContainer[int]
    attempt_age_us: int
    def __init__(self, ticket: _Optional[_Union[Ticket, _Mapping]] = ..., spec: _Optional[bytes] = ..., age_us: _Optional[int] = ..., remaining_us: _Optional[int] = ..., is_admitted: _Optional[bool] = ..., block_hashes: _Optional[_Iterable[int]] = ..., attempt_age_us: _Optional[int] = ...) -> None: ...

class CancelRun(_message.Message):
    __slots__ = ("run_id",)
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    def __init__(self, run_id: _Optional[str] = ...) -> None: ...

class SubmitResponse(_message.Message):
    __slots__ = ("hello", "accepted", "refused", "dispatched", "dropped", "heartbeat", "adapters")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    DISPATCHED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    hello: SchedulerHello
    accepted: RunAccepted
    refused: RunRefused
    dispatched: RunDispatched
    dropped: RunDropped
    heartbeat: Heartbeat
    adapters: ServedAdapters
    def __init__(self, hello: _Optional[_Union[SchedulerHello, _Mapping]] = ..., accepted: _Optional[_Union[RunAccepted, _Mapping]] = ..., refused: _Optional[_Union[RunRefused, _Mapping]] = ..., dispatched: _Optional[_Union[RunDispatched, _Mapping]] = ..., dropped: _Optional[_Union[RunDropped, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., adapters: _Optional[_Union[ServedAdapters, _Mapping]] = ...) -> None: ...

class ServedAdapters(_message.Message):
    __slots__ = ("adapters",)
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    def __init__(self, adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ...) -> None: ...

class Adapter(_message.Message):
    __slots__ = ("name", "fingerprint")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    name: str
    fingerprint: str
    def __init__(self, name: _Optional[str] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("problem",)
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    problem: str
    def __init__(self, problem: _Optional[str] = ...) -> None: ...

class SchedulerHello(_message.Message):
    __slots__ = ("scheduler_id", "epoch")
    SCHEDULER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    scheduler_id: str
    epoch: int
    def __init__(self, scheduler_id: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class RunAccepted(_message.Message):
    __slots__ = ("run_id",)
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    def __init__(self, run_id: _Optional[str] = ...) -> None: ...

class RunRefused(_message.Message):
    __slots__ = ("run_id", "reason", "retry_delay_ms")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RETRY_DELAY_MS_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    reason: RefuseReason
    retry_delay_ms: int
    def __init__(self, run_id: _Optional[str] = ..., reason: _Optional[_Union[RefuseReason, str]] = ..., retry_delay_ms: _Optional[int] = ...) -> None: ...

class RunDispatched(_message.Message):
    __slots__ = ("run_id", "worker_id", "waited_us")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    WAITED_US_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    worker_id: str
    waited_us: int
    def __init__(self, run_id: _Optional[str] = ..., worker_id: _Optional[str] = ..., waited_us: _Optional[int] = ...) -> None: ...

class RunDropped(_message.Message):
    __slots__ = ("run_id", "reason")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    reason: DropReason
    def __init__(self, run_id: _Optional[str] = ..., reason: _Optional[_Union[DropReason, str]] = ...) -> None: ...

class WorkRequest(_message.Message):
    __slots__ = ("hello", "report", "prefilled", "finished", "draining", "kv_pulled", "adapters")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    PREFILLED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    KV_PULLED_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    hello: WorkerHello
    report: WorkerReport
    prefilled: BatchPrefilled
    finished: RunFinished
    draining: WorkerDraining
    kv_pulled: KvPulled
    adapters: WorkerAdapters
    def __init__(self, hello: _Optional[_Union[WorkerHello, _Mapping]] = ..., report: _Optional[_Union[WorkerReport, _Mapping]] = ..., prefilled: _Optional[_Union[BatchPrefilled, _Mapping]] = ..., finished: _Optional[_Union[RunFinished, _Mapping]] = ..., draining: _Optional[_Union[WorkerDraining, _Mapping]] = ..., kv_pulled: _Optional[_Union[KvPulled, _Mapping]] = ..., adapters: _Optional[_Union[WorkerAdapters, _Mapping]] = ...) -> None: ...

class WorkerHello(_message.Message):
    __slots__ = ("worker_id", "model", "role", "address", "engine", "context_tokens", "report", "running", "is_draining", "fingerprint", "tokenizer", "instance", "has_grammars", "keeps_kv", "adapters", "step_tokens")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    IS_DRAINING_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    HAS_GRAMMARS_FIELD_NUMBER: _ClassVar[int]
    KEEPS_KV_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    STEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    model: str
    role: _common_pb2.WorkerRole
    address: str
    engine: str
    context_tokens: int
    report: WorkerReport
    running: _containers.RepeatedCompositeFieldContainer[RunningRun]
    is_draining: bool
    fingerprint: str
    tokenizer: str
    instance: str
    has_grammars: bool
    keeps_kv: bool
    adapters: WorkerAdapters
    step_tokens: int
    def __init__(self, worker_id: _Optional[str] = ..., model: _Optional[str] = ..., role: _Optional[_Union[_common_pb2.WorkerRole, str]] = ..., address: _Optional[str] = ..., engine: _Optional[str] = ..., context_tokens: _Optional[int] = ..., report: _Optional[_Union[WorkerReport, _Mapping]] = ..., running: _Optional[_Iterable[_Union[RunningRun, _Mapping]]] = ..., is_draining: _Optional[bool] = ..., fingerprint: _Optional[str] = ..., tokenizer: _Optional[str] = ..., instance: _Optional[str] = ..., has_grammars: _Optional[bool] = ..., keeps_kv: _Optional[bool] = ..., adapters: _Optional[_Union[WorkerAdapters, _Mapping]] = ..., step_tokens: _Optional[int] = ...) -> None: ...

class WorkerAdapters(_message.Message):
    __slots__ = ("adapters",)
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    def __init__(self, adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ...) -> None: ...

class RunningRun(_message.Message):
    __slots__ = ("run_id", "held", "assignment", "held_us")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    HELD_US_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    held: HeldKv
    assignment: int
    held_us: int
    def __init__(self, run_id: _Optional[str] = ..., held: _Optional[_Union[HeldKv, _Mapping]] = ..., assignment: _Optional[int] = ..., held_us: _Optional[int] = ...) -> None: ...

class HeldKv(_message.Message):
    __slots__ = ("run_id", "layout", "kv_bytes", "num_bytes", "checksum", "prefill_us", "shared_memory", "secret")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    PREFILL_US_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    layout: str
    kv_bytes: int
    num_bytes: int
    checksum: int
    prefill_us: int
    shared_memory: SharedMemory
    secret: bytes
    def __init__(self, run_id: _Optional[str] = ..., layout: _Optional[str] = ..., kv_bytes: _Optional[int] = ..., num_bytes: _Optional[int] = ..., checksum: _Optional[int] = ..., prefill_us: _Optional[int] = ..., shared_memory: _Optional[_Union[SharedMemory, _Mapping]] = ..., secret: _Optional[bytes] = ...) -> None: ...

class SharedMemory(_message.Message):
    __slots__ = ("locality", "path", "offset")
    LOCALITY_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    locality: str
    path: str
    offset: int
    def __init__(self, locality: _Optional[str] = ..., path: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class WorkerReport(_message.Message):
    __slots__ = ("kv_total_tokens", "kv_free_tokens", "kv_bytes_per_token", "device_total_bytes", "device_reserved_bytes", "device_free_bytes", "weights_bytes", "activation_bytes_per_token", "max_sequences", "num_running", "num_waiting", "waiting_prefill_tokens", "last_assignment", "steps", "num_out_of_memory", "num_decode_steps", "is_delivering", "computing_prefill_tokens")
    KV_TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_FREE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    DEVICE_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    WAITING_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAST_ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_OUT_OF_MEMORY_FIELD_NUMBER: _ClassVar[int]
    NUM_DECODE_STEPS_FIELD_NUMBER: _ClassVar[int]
    IS_DELIVERING_FIELD_NUMBER: _ClassVar[int]
    COMPUTING_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    kv_total_tokens: int
    kv_free_tokens: int
    kv_bytes_per_token: int
    device_total_bytes: int
    device_reserved_bytes: int
    device_free_bytes: int
    weights_bytes: int
    activation_bytes_per_token: int
    max_sequences: int
    num_running: int
    num_waiting: int
    waiting_prefill_tokens: int
    last_assignment: int
    steps: _containers.RepeatedCompositeFieldContainer[StepSample]
    num_out_of_memory: int
    num_decode_steps: int
    is_delivering: bool
    computing_prefill_tokens: int
    def __init__(self, kv_total_tokens: _Optional[int] = ..., kv_free_tokens: _Optional[int] = ..., kv_bytes_per_token: _Optional[int] = ..., device_total_bytes: _Optional[int] = ..., device_reserved_bytes: _Optional[int] = ..., device_free_bytes: _Optional[int] = ..., weights_bytes: _Optional[int] = ..., activation_bytes_per_token: _Optional[int] = ..., max_sequences: _Optional[int] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., waiting_prefill_tokens: _Optional[int] = ..., last_assignment: _Optional[int] = ..., steps: _Optional[_Iterable[_Union[StepSample, _Mapping]]] = ..., num_out_of_memory: _Optional[int] = ..., num_decode_steps: _Optional[int] = ..., is_delivering: _Optional[bool] = ..., computing_prefill_tokens: _Optional[int] = ...) -> None: ...

class StepSample(_message.Message):
    __slots__ = ("prefill_tokens", "prefill_attention", "decode_sequences", "decode_context_tokens", "duration_us")
    PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_ATTENTION_FIELD_NUMBER: _ClassVar[int]
    DECODE_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    DECODE_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DURATION_US_FIELD_NUMBER: _ClassVar[int]
    prefill_tokens: int
    prefill_attention: int
    decode_sequences: int
    decode_context_tokens: int
    duration_us: int
    def __init__(self, prefill_tokens: _Optional[int] = ..., prefill_attention: _Optional[int] = ..., decode_sequences: _Optional[int] = ..., decode_context_tokens: _Optional[int] = ..., duration_us: _Optional[int] = ...) -> None: ...

class BatchPrefilled(_message.Message):
    __slots__ = ("assignment", "run_ids", "held", "cached_prompt_tokens")
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    RUN_IDS_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    CACHED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    assignment: int
    run_ids: _containers.RepeatedScalarFieldContainer[str]
    held: _containers.RepeatedCompositeFieldContainer[HeldKv]
    cached_prompt_tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, assignment: _Optional[int] = ..., run_ids: _Optional[_Iterable[str]] = ..., held: _Optional[_Iterable[_Union[HeldKv, _Mapping]]] = ..., cached_prompt_tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class KvPulled(_message.Message):
    __slots__ = ("run_id", "assignment", "is_ok")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    IS_OK_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    assignment: int
    is_ok: bool
    def __init__(self, run_id: _Optional[str] = ..., assignment: _Optional[int] = ..., is_ok: _Optional[bool] = ...) -> None: ...

class RunFinished(_message.Message):
    __slots__ = ("run_id", "reason", "output_tokens", "is_retryable", "assignment")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IS_RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    reason: _common_pb2.FinishReason
    output_tokens: int
    is_retryable: bool
    assignment: int
    def __init__(self, run_id: _Optional[str] = ..., reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., output_tokens: _Optional[int] = ..., is_retryable: _Optional[bool] = ..., assignment: _Optional[int] = ...) -> None: ...

class WorkerDraining(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkResponse(_message.Message):
    __slots__ = ("welcome", "batch", "cancel", "heartbeat", "pull", "switch_role", "no_more_work", "preempt")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    PULL_FIELD_NUMBER: _ClassVar[int]
    SWITCH_ROLE_FIELD_NUMBER: _ClassVar[int]
    NO_MORE_WORK_FIELD_NUMBER: _ClassVar[int]
    PREEMPT_FIELD_NUMBER: _ClassVar[int]
    welcome: WorkerWelcome
    batch: BatchAssignment
    cancel: CancelRuns
    heartbeat: Heartbeat
    pull: PullKv
    switch_role: SwitchRole
    no_more_work: NoMoreWork
    preempt: PreemptRuns
    def __init__(self, welcome: _Optional[_Union[WorkerWelcome, _Mapping]] = ..., batch: _Optional[_Union[BatchAssignment, _Mapping]] = ..., cancel: _Optional[_Union[CancelRuns, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., pull: _Optional[_Union[PullKv, _Mapping]] = ..., switch_role: _Optional[_Union[SwitchRole, _Mapping]] = ..., no_more_work: _Optional[_Union[NoMoreWork, _Mapping]] = ..., preempt: _Optional[_Union[PreemptRuns, _Mapping]] = ...) -> None: ...

class NoMoreWork(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PullKv(_message.Message):
    __slots__ = ("run_id", "batch", "source_worker_id", "source_address", "kv", "epoch", "assignment")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    SOURCE_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    SOURCE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    batch: _common_pb2.BatchInfo
    source_worker_id: str
    source_address: str
    kv: HeldKv
    epoch: int
    assignment: int
    def __init__(self, run_id: _Optional[str] = ..., batch: _Optional[_Union[_common_pb2.BatchInfo, _Mapping]] = ..., source_worker_id: _Optional[str] = ..., source_address: _Optional[str] = ..., kv: _Optional[_Union[HeldKv, _Mapping]] = ..., epoch: _Optional[int] = ..., assignment: _Optional[int] = ...) -> None: ...

class SwitchRole(_message.Message):
    __slots__ = ("role",)
    ROLE_FIELD_NUMBER: _ClassVar[int]
    role: _common_pb2.WorkerRole
    def __init__(self, role: _Optional[_Union[_common_pb2.WorkerRole, str]] = ...) -> None: ...

class WorkerWelcome(_message.Message):
    __slots__ = ("scheduler", "report_interval_ms")
    SCHEDULER_FIELD_NUMBER: _ClassVar[int]
    REPORT_INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    scheduler: SchedulerHello
    report_interval_ms: int
    def __init__(self, scheduler: _Optional[_Union[SchedulerHello, _Mapping]] = ..., report_interval_ms: _Optional[int] = ...) -> None: ...

class BatchAssignment(_message.Message):
    __slots__ = ("assignment", "epoch", "batch", "runs", "max_chunk_tokens")
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    assignment: int
    epoch: int
    batch: _common_pb2.BatchInfo
    runs: _containers.RepeatedCompositeFieldContainer[AssignedRun]
    max_chunk_tokens: int
    def __init__(self, assignment: _Optional[int] = ..., epoch: _Optional[int] = ..., batch: _Optional[_Union[_common_pb2.BatchInfo, _Mapping]] = ..., runs: _Optional[_Iterable[_Union[AssignedRun, _Mapping]]] = ..., max_chunk_tokens: _Optional[int] = ...) -> None: ...

class AssignedRun(_message.Message):
    __slots__ = ("run_id", "spec")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    spec: bytes
    def __init__(self, run_id: _Optional[str] = ..., spec: _Optional[bytes] = ...) -> None: ...

class CancelRuns(_message.Message):
    __slots__ = ("run_ids",)
    RUN_IDS_FIELD_NUMBER: _ClassVar[int]
    run_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, run_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class PreemptRuns(_message.Message):
    __slots__ = ("run_ids",)
    RUN_IDS_FIELD_NUMBER: _ClassVar[int]
    run_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, run_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("scheduler_id", "models")
    SCHEDULER_ID_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    scheduler_id: str
    models: _containers.RepeatedCompositeFieldContainer[ModelStatus]
    def __init__(self, scheduler_id: _Optional[str] = ..., models: _Optional[_Iterable[_Union[ModelStatus, _Mapping]]] = ...) -> None: ...

class ModelStatus(_message.Message):
    __slots__ = ("model", "buckets", "workers", "num_waiting", "num_running", "policy", "num_finished", "num_batches", "scheduler")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BUCKETS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    NUM_FINISHED_FIELD_NUMBER: _ClassVar[int]
    NUM_BATCHES_FIELD_NUMBER: _ClassVar[int]
    SCHEDULER_FIELD_NUMBER: _ClassVar[int]
    model: str
    buckets: _containers.RepeatedCompositeFieldContainer[BucketStatus]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    num_waiting: int
    num_running: int
    policy: str
    num_finished: int
    num_batches: int
    scheduler: SchedulerHello
    def __init__(self, model: _Optional[str] = ..., buckets: _Optional[_Iterable[_Union[BucketStatus, _Mapping]]] = ..., workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., num_waiting: _Optional[int] = ..., num_running: _Optional[int] = ..., policy: _Optional[str] = ..., num_finished: _Optional[int] = ..., num_batches: _Optional[int] = ..., scheduler: _Optional[_Union[SchedulerHello, _Mapping]] = ...) -> None: ...

class BucketStatus(_message.Message):
    __slots__ = ("low_tokens", "high_tokens", "num_waiting", "waiting_tokens")
    LOW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HIGH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    low_tokens: int
    high_tokens: int
    num_waiting: int
    waiting_tokens: int
    def __init__(self, low_tokens: _Optional[int] = ..., high_tokens: _Optional[int] = ..., num_waiting: _Optional[int] = ..., waiting_tokens: _Optional[int] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("worker_id", "role", "engine", "report", "report_age_ms", "is_draining")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    REPORT_AGE_MS_FIELD_NUMBER: _ClassVar[int]
    IS_DRAINING_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: _common_pb2.WorkerRole
    engine: str
    report: WorkerReport
    report_age_ms: int
    is_draining: bool
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[_Union[_common_pb2.WorkerRole, str]] = ..., engine: _Optional[str] = ..., report: _Optional[_Union[WorkerReport, _Mapping]] = ..., report_age_ms: _Optional[int] = ..., is_draining: _Optional[bool] = ...) -> None: ...
