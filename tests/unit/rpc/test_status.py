"""What a status says stays within what peers take, whatever a client sent."""

from __future__ import annotations

import pytest
from google.rpc import error_details_pb2, status_pb2

from bucketserve.core.errors import BucketServeError, FieldViolation, InvalidRequestError, UnknownModelError
from bucketserve.rpc.status import status_of

HUGE = "x" * 5_000_000
ERRORS = {
    "many violations": InvalidRequestError([FieldViolation(f"items[{i}]", "must not be empty") for i in range(4096)]),
    "long violation": InvalidRequestError([FieldViolation(HUGE, HUGE)]),
    "long name": UnknownModelError(HUGE, ["demo"]),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_a_status_fits_into_trailers(error: BucketServeError) -> None:
    status = status_of(error)
    details = dict(status.trailing_metadata)["grpc-status-details-bin"]
    assert len(details) + len(status.details) < 8000
    kinds = (error_details_pb2.BadRequest(), error_details_pb2.ResourceInfo())
    packed = status_pb2.Status.FromString(details).details
    assert any(detail.Unpack(kind) for detail in packed for kind in kinds)
