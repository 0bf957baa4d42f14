from bucketserve.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RejectReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REJECT_REASON_UNSPECIFIED: _ClassVar[RejectReason]
    REJECT_REASON_QUEUE_REQUESTS: _ClassVar[RejectReason]
    REJECT_REASON_QUEUE_TOKENS: _ClassVar[RejectReason]
    REJECT_REASON_TENANT_QUOTA: _ClassVar[RejectReason]
    REJECT_REASON_SLO_UNATTAINABLE: _ClassVar[RejectReason]
    REJECT_REASON_TOO_LARGE: _ClassVar[RejectReason]
    REJECT_REASON_DUPLICATE: _ClassVar[RejectReason]

class DropReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DROP_REASON_UNSPECIFIED: _ClassVar[DropReason]
    DROP_REASON_DEADLINE: _ClassVar[DropReason]
    DROP_REASON_CANCELLED: _ClassVar[DropReason]
    DROP_REASON_WORKER_LOST: _ClassVar[DropReason]
    DROP_REASON_WORKER_FAILED: _ClassVar[DropReason]
    DROP_REASON_TOO_LARGE: _ClassVar[DropReason]
REJECT_REASON_UNSPECIFIED: RejectReason
REJECT_REASON_QUEUE_REQUESTS: RejectReason
REJECT_REASON_QUEUE_TOKENS: RejectReason
REJECT_REASON_TENANT_QUOTA: RejectReason
REJECT_REASON_SLO_UNATTAINABLE: RejectReason
REJECT_REASON_TOO_LARGE: RejectReason
REJECT_REASON_DUPLICATE: RejectReason
DROP_REASON_UNSPECIFIED: DropReason
DROP_REASON_DEADLINE: DropReason
DROP_REASON_CANCELLED: DropReason
DROP_REASON_WORKER_LOST: DropReason
DROP_REASON_WORKER_FAILED: DropReason
DROP_REASON_TOO_LARGE: DropReason

class QueueRecord(_message.Message):
    __slots__ = ("request_id", "attempt", "model", "token_ids", "num_resumed_tokens", "max_new_tokens", "sampling", "stop_token_ids", "num_logprobs", "request_class", "tenant", "slo", "arrival_unix_us", "deadline_unix_us", "gateway_id", "delivery_address", "traceparent", "tracestate", "context_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_RESUMED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_CLASS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SLO_FIELD_NUMBER: _ClassVar[int]
    ARRIVAL_UNIX_US_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_UNIX_US_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    DELIVERY_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    TRACESTATE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    model: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_resumed_tokens: int
    max_new_tokens: int
    sampling: _common_pb2.SamplingParams
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_logprobs: int
    request_class: _common_pb2.RequestClass
    tenant: str
    slo: _common_pb2.Slo
    arrival_unix_us: int
    deadline_unix_us: int
    gateway_id: str
    delivery_address: str
    traceparent: str
    tracestate: str
    context_tokens: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., model: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., num_resumed_tokens: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., num_logprobs: _Optional[int] = ..., request_class: _Optional[_Union[_common_pb2.RequestClass, str]] = ..., tenant: _Optional[str] = ..., slo: _Optional[_Union[_common_pb2.Slo, _Mapping]] = ..., arrival_unix_us: _Optional[int] = ..., deadline_unix_us: _Optional[int] = ..., gateway_id: _Optional[str] = ..., delivery_address: _Optional[str] = ..., traceparent: _Optional[str] = ..., tracestate: _Optional[str] = ..., context_tokens: _Optional[int] = ...) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("hello", "record", "cancel")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    hello: GatewayHello
    record: QueueRecord
    cancel: CancelRecord
    def __init__(self, hello: _Optional[_Union[GatewayHello, _Mapping]] = ..., record: _Optional[_Union[QueueRecord, _Mapping]] = ..., cancel: _Optional[_Union[CancelRecord, _Mapping]] = ...) -> None: ...

class GatewayHello(_message.Message):
    __slots__ = ("gateway_id",)
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    gateway_id: str
    def __init__(self, gateway_id: _Optional[str] = ...) -> None: ...

class CancelRecord(_message.Message):
    __slots__ = ("model", "request_id")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    model: str
    request_id: str
    def __init__(self, model: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class SubmitResponse(_message.Message):
    __slots__ = ("hello", "accepted", "rejected", "dispatched", "dropped", "heartbeat")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    DISPATCHED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    hello: SchedulerHello
    accepted: RecordAccepted
    rejected: RecordRejected
    dispatched: RecordDispatched
    dropped: RecordDropped
    heartbeat: Heartbeat
    def __init__(self, hello: _Optional[_Union[SchedulerHello, _Mapping]] = ..., accepted: _Optional[_Union[RecordAccepted, _Mapping]] = ..., rejected: _Optional[_Union[RecordRejected, _Mapping]] = ..., dispatched: _Optional[_Union[RecordDispatched, _Mapping]] = ..., dropped: _Optional[_Union[RecordDropped, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SchedulerHello(_message.Message):
    __slots__ = ("scheduler_id", "epoch")
    SCHEDULER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    scheduler_id: str
    epoch: int
    def __init__(self, scheduler_id: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class RecordAccepted(_message.Message):
    __slots__ = ("request_id", "attempt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class RecordRejected(_message.Message):
    __slots__ = ("request_id", "attempt", "reason", "retry_delay_ms")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RETRY_DELAY_MS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    reason: RejectReason
    retry_delay_ms: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., reason: _Optional[_Union[RejectReason, str]] = ..., retry_delay_ms: _Optional[int] = ...) -> None: ...

class RecordDispatched(_message.Message):
    __slots__ = ("request_id", "attempt", "worker_id", "dispatched_unix_us", "batch")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    DISPATCHED_UNIX_US_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    worker_id: str
    dispatched_unix_us: int
    batch: _common_pb2.BatchInfo
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., worker_id: _Optional[str] = ..., dispatched_unix_us: _Optional[int] = ..., batch: _Optional[_Union[_common_pb2.BatchInfo, _Mapping]] = ...) -> None: ...

class RecordDropped(_message.Message):
    __slots__ = ("request_id", "attempt", "reason")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    reason: DropReason
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., reason: _Optional[_Union[DropReason, str]] = ...) -> None: ...

class WorkRequest(_message.Message):
    __slots__ = ("hello", "report", "prefilled", "finished", "draining", "kv_moved")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    PREFILLED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    KV_MOVED_FIELD_NUMBER: _ClassVar[int]
    hello: WorkerHello
    report: WorkerReport
    prefilled: BatchPrefilled
    finished: RecordFinished
    draining: WorkerDraining
    kv_moved: KvMoved
    def __init__(self, hello: _Optional[_Union[WorkerHello, _Mapping]] = ..., report: _Optional[_Union[WorkerReport, _Mapping]] = ..., prefilled: _Optional[_Union[BatchPrefilled, _Mapping]] = ..., finished: _Optional[_Union[RecordFinished, _Mapping]] = ..., draining: _Optional[_Union[WorkerDraining, _Mapping]] = ..., kv_moved: _Optional[_Union[KvMoved, _Mapping]] = ...) -> None: ...

class WorkerHello(_message.Message):
    __slots__ = ("worker_id", "model", "role", "address", "engine", "pays_padding", "context_tokens", "report", "running", "is_draining")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    PAYS_PADDING_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    IS_DRAINING_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    model: str
    role: _common_pb2.WorkerRole
    address: str
    engine: str
    pays_padding: bool
    context_tokens: int
    report: WorkerReport
    running: _containers.RepeatedCompositeFieldContainer[RunningRecord]
    is_draining: bool
    def __init__(self, worker_id: _Optional[str] = ..., model: _Optional[str] = ..., role: _Optional[_Union[_common_pb2.WorkerRole, str]] = ..., address: _Optional[str] = ..., engine: _Optional[str] = ..., pays_padding: _Optional[bool] = ..., context_tokens: _Optional[int] = ..., report: _Optional[_Union[WorkerReport, _Mapping]] = ..., running: _Optional[_Iterable[_Union[RunningRecord, _Mapping]]] = ..., is_draining: _Optional[bool] = ...) -> None: ...

class RunningRecord(_message.Message):
    __slots__ = ("request_id", "attempt", "held")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    held: HeldKv
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., held: _Optional[_Union[HeldKv, _Mapping]] = ...) -> None: ...

class HeldKv(_message.Message):
    __slots__ = ("request_id", "num_tokens", "layout", "kv_bytes", "num_bytes", "checksum", "prefill_us", "shared_memory")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    PREFILL_US_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    num_tokens: int
    layout: str
    kv_bytes: int
    num_bytes: int
    checksum: int
    prefill_us: int
    shared_memory: SharedMemory
    def __init__(self, request_id: _Optional[str] = ..., num_tokens: _Optional[int] = ..., layout: _Optional[str] = ..., kv_bytes: _Optional[int] = ..., num_bytes: _Optional[int] = ..., checksum: _Optional[int] = ..., prefill_us: _Optional[int] = ..., shared_memory: _Optional[_Union[SharedMemory, _Mapping]] = ...) -> None: ...

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
    __slots__ = ("kv_total_tokens", "kv_free_tokens", "kv_bytes_per_token", "device_total_bytes", "device_reserved_bytes", "device_free_bytes", "weights_bytes", "activation_bytes_per_token", "max_sequences", "num_running", "num_waiting", "waiting_prefill_tokens", "last_assignment", "steps", "num_out_of_memory")
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
    def __init__(self, kv_total_tokens: _Optional[int] = ..., kv_free_tokens: _Optional[int] = ..., kv_bytes_per_token: _Optional[int] = ..., device_total_bytes: _Optional[int] = ..., device_reserved_bytes: _Optional[int] = ..., device_free_bytes: _Optional[int] = ..., weights_bytes: _Optional[int] = ..., activation_bytes_per_token: _Optional[int] = ..., max_sequences: _Optional[int] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., waiting_prefill_tokens: _Optional[int] = ..., last_assignment: _Optional[int] = ..., steps: _Optional[_Iterable[_Union[StepSample, _Mapping]]] = ..., num_out_of_memory: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("batch_id", "duration_us", "request_ids", "held")
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    DURATION_US_FIELD_NUMBER: _ClassVar[int]
    REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    batch_id: str
    duration_us: int
    request_ids: _containers.RepeatedScalarFieldContainer[str]
    held: _containers.RepeatedCompositeFieldContainer[HeldKv]
    def __init__(self, batch_id: _Optional[str] = ..., duration_us: _Optional[int] = ..., request_ids: _Optional[_Iterable[str]] = ..., held: _Optional[_Iterable[_Union[HeldKv, _Mapping]]] = ...) -> None: ...

class KvMoved(_message.Message):
    __slots__ = ("request_id", "attempt", "source_worker_id", "is_ok")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    IS_OK_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    source_worker_id: str
    is_ok: bool
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., source_worker_id: _Optional[str] = ..., is_ok: _Optional[bool] = ...) -> None: ...

class RecordFinished(_message.Message):
    __slots__ = ("request_id", "attempt", "reason", "output_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    reason: _common_pb2.FinishReason
    output_tokens: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., output_tokens: _Optional[int] = ...) -> None: ...

class WorkerDraining(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkResponse(_message.Message):
    __slots__ = ("welcome", "batch", "cancel", "heartbeat", "pull", "switch_role", "no_more_work")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    PULL_FIELD_NUMBER: _ClassVar[int]
    SWITCH_ROLE_FIELD_NUMBER: _ClassVar[int]
    NO_MORE_WORK_FIELD_NUMBER: _ClassVar[int]
    welcome: WorkerWelcome
    batch: BatchAssignment
    cancel: CancelRecords
    heartbeat: Heartbeat
    pull: PullKv
    switch_role: SwitchRole
    no_more_work: NoMoreWork
    def __init__(self, welcome: _Optional[_Union[WorkerWelcome, _Mapping]] = ..., batch: _Optional[_Union[BatchAssignment, _Mapping]] = ..., cancel: _Optional[_Union[CancelRecords, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., pull: _Optional[_Union[PullKv, _Mapping]] = ..., switch_role: _Optional[_Union[SwitchRole, _Mapping]] = ..., no_more_work: _Optional[_Union[NoMoreWork, _Mapping]] = ...) -> None: ...

class NoMoreWork(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PullKv(_message.Message):
    __slots__ = ("record", "batch", "source_worker_id", "source_address", "kv", "epoch")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    SOURCE_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    SOURCE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    record: QueueRecord
    batch: _common_pb2.BatchInfo
    source_worker_id: str
    source_address: str
    kv: HeldKv
    epoch: int
    def __init__(self, record: _Optional[_Union[QueueRecord, _Mapping]] = ..., batch: _Optional[_Union[_common_pb2.BatchInfo, _Mapping]] = ..., source_worker_id: _Optional[str] = ..., source_address: _Optional[str] = ..., kv: _Optional[_Union[HeldKv, _Mapping]] = ..., epoch: _Optional[int] = ...) -> None: ...

class SwitchRole(_message.Message):
    __slots__ = ("role",)
    ROLE_FIELD_NUMBER: _ClassVar[int]
    role: _common_pb2.WorkerRole
    def __init__(self, role: _Optional[_Union[_common_pb2.WorkerRole, str]] = ...) -> None: ...

class WorkerWelcome(_message.Message):
    __slots__ = ("scheduler", "report_interval_ms", "lease_ms")
    SCHEDULER_FIELD_NUMBER: _ClassVar[int]
    REPORT_INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    scheduler: SchedulerHello
    report_interval_ms: int
    lease_ms: int
    def __init__(self, scheduler: _Optional[_Union[SchedulerHello, _Mapping]] = ..., report_interval_ms: _Optional[int] = ..., lease_ms: _Optional[int] = ...) -> None: ...

class BatchAssignment(_message.Message):
    __slots__ = ("assignment", "epoch", "batch", "records", "max_chunk_tokens", "dispatched_unix_us")
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DISPATCHED_UNIX_US_FIELD_NUMBER: _ClassVar[int]
    assignment: int
    epoch: int
    batch: _common_pb2.BatchInfo
    records: _containers.RepeatedCompositeFieldContainer[QueueRecord]
    max_chunk_tokens: int
    dispatched_unix_us: int
    def __init__(self, assignment: _Optional[int] = ..., epoch: _Optional[int] = ..., batch: _Optional[_Union[_common_pb2.BatchInfo, _Mapping]] = ..., records: _Optional[_Iterable[_Union[QueueRecord, _Mapping]]] = ..., max_chunk_tokens: _Optional[int] = ..., dispatched_unix_us: _Optional[int] = ...) -> None: ...

class CancelRecords(_message.Message):
    __slots__ = ("request_ids",)
    REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    request_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, request_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("scheduler", "models")
    SCHEDULER_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    scheduler: SchedulerHello
    models: _containers.RepeatedCompositeFieldContainer[ModelStatus]
    def __init__(self, scheduler: _Optional[_Union[SchedulerHello, _Mapping]] = ..., models: _Optional[_Iterable[_Union[ModelStatus, _Mapping]]] = ...) -> None: ...

class ModelStatus(_message.Message):
    __slots__ = ("model", "buckets", "workers", "num_waiting", "num_running", "policy", "num_finished", "num_batches")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BUCKETS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    NUM_FINISHED_FIELD_NUMBER: _ClassVar[int]
    NUM_BATCHES_FIELD_NUMBER: _ClassVar[int]
    model: str
    buckets: _containers.RepeatedCompositeFieldContainer[BucketStatus]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    num_waiting: int
    num_running: int
    policy: str
    num_finished: int
    num_batches: int
    def __init__(self, model: _Optional[str] = ..., buckets: _Optional[_Iterable[_Union[BucketStatus, _Mapping]]] = ..., workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., num_waiting: _Optional[int] = ..., num_running: _Optional[int] = ..., policy: _Optional[str] = ..., num_finished: _Optional[int] = ..., num_batches: _Optional[int] = ...) -> None: ...

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
