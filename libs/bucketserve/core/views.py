"""The core as it stands, for status and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bucketserve.core.edges import EdgeChooser
from bucketserve.core.fleet import Fleet
from bucketserve.core.lanes import Lanes
from bucketserve.core.lifecycle import Lifecycle
from bucketserve.core.types import Bucket, WorkerId, WorkerRole
from bucketserve.core.waste import Waste, WasteBook

__all__ = ["BucketView", "CoreView", "view"]


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


def view(lanes: Lanes, edges: EdgeChooser, lives: Lifecycle, fleet: Fleet, waste: WasteBook) -> CoreView:
    """Returns what the core's parts say now. O(cells + workers)."""
    return CoreView(
        buckets=tuple(BucketView(bucket, *lanes.count(bucket)) for bucket in edges.buckets),
        num_waiting=len(lanes),
        num_deferred=lanes.num_deferred,
        num_running=lives.num_at_workers,
        predicted_waste=edges.predicted_waste(),
        observed_waste=waste.observed(),
        roles={worker.worker_id: worker.role for worker in fleet},
    )
