from bucketserve.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DeliverRequest(_message.Message):
    __slots__ = ("worker_id", "fingerprint", "deliveries")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DELIVERIES_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    fingerprint: str
    deliveries: _containers.RepeatedCompositeFieldContainer[TokenDelivery]
    def __init__(self, worker_id: _Optional[str] = ..., fingerprint: _Optional[str] = ..., deliveries: _Optional[_Iterable[_Union[TokenDelivery, _Mapping]]] = ...) -> None: ...

class TokenDelivery(_message.Message):
    __slots__ = ("run_id", "first_index", "token_ids", "logprobs", "finished", "batch")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    first_index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.PositionLogprobs]
    finished: DeliveryFinished
    batch: _common_pb2.BatchInfo
    def __init__(self, run_id: _Optional[str] = ..., first_index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_common_pb2.PositionLogprobs, _Mapping]]] = ..., finished: _Optional[_Union[DeliveryFinished, _Mapping]] = ..., batch: _Optional[_Union[_common_pb2.BatchInfo, _Mapping]] = ...) -> None: ...

class DeliveryFinished(_message.Message):
    __slots__ = ("reason", "matched_stop_token_id", "cached_prompt_tokens", "prefill_us", "decode_us", "error_message", "is_retryable")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MATCHED_STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    CACHED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_US_FIELD_NUMBER: _ClassVar[int]
    DECODE_US_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    IS_RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    reason: _common_pb2.FinishReason
    matched_stop_token_id: int
    cached_prompt_tokens: int
    prefill_us: int
    decode_us: int
    error_message: str
    is_retryable: bool
    def __init__(self, reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., matched_stop_token_id: _Optional[int] = ..., cached_prompt_tokens: _Optional[int] = ..., prefill_us: _Optional[int] = ..., decode_us: _Optional[int] = ..., error_message: _Optional[str] = ..., is_retryable: _Optional[bool] = ...) -> None: ...

class DeliverResponse(_message.Message):
    __slots__ = ("stopped_run_ids", "num_received")
    STOPPED_RUN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    stopped_run_ids: _containers.RepeatedScalarFieldContainer[str]
    num_received: int
    def __init__(self, stopped_run_ids: _Optional[_Iterable[str]] = ..., num_received: _Optional[int] = ...) -> None: ...
