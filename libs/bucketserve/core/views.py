"""The core as it stands, for status and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bucketserve.core.types import Bucket, WorkerId, WorkerRole
from bucketserve.core.waste import Waste

__all__ = ["BucketView", "CoreView"]


@dataclass(frozen=True, slots=True)
class BucketView:
    """A bucket as it stands."""

    bucket: Bucket
    num_waiting: int
    waiting_tokens: int


@dataclass(frozen=True, slots=True)
class CoreView:
    """The core as it stands."""

    buckets: tuple[BucketView, ...]
    num_waiting: int
    num_deferred: int
    num_running: int
    predicted_waste: Waste
    """Of a batch padded to its bucket's edge, over the lengths that arrive."""
    observed_waste: Waste
    """Of the batches so far, if each were padded to its longest prompt."""
    roles: Mapping[WorkerId, WorkerRole]
    """Of the workers, as they are now."""
