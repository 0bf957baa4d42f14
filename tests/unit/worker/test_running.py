"""What becomes of a step's tokens: each is sent once, in its place."""

from __future__ import annotations

from typing import Any

from bucketserve.core.types import FinishReason, RequestId
from bucketserve.ports import StepOutput, TokenOutput
from bucketserve.v1 import common_pb2, delivery_pb2, scheduler_pb2
from bucketserve_worker.running import RunningTable, run_of


class Sent:
    """In place of the pool that sends it."""

    def __init__(self) -> None:
        self.deliveries: list[delivery_pb2.TokenDelivery] = []

    def send(self, address: str, delivery: delivery_pb2.TokenDelivery) -> None:
        self.deliveries.append(delivery)


def token(key: RequestId, token_id: int | None, finish_reason: FinishReason | None = None) -> TokenOutput:
    return TokenOutput(request_id=key, token_id=token_id, finish_reason=finish_reason)


def test_a_step_may_bring_none_one_or_several_tokens_of_each_run() -> None:
    sent: Any = Sent()
    table = RunningTable(sent, lambda: 0.0)
    spec = scheduler_pb2.RunSpec(max_new_tokens=9).SerializeToString()
    runs = [scheduler_pb2.AssignedRun(run_id=name, spec=spec) for name in ("a.1", "b#2.1")]
    added = table.add(scheduler_pb2.BatchAssignment(assignment=1, batch=common_pb2.BatchInfo(batch_id="x"), runs=runs))
    (a, _), (b, _) = added
    assert [run_of(a), run_of(b)] == ["a.1", "b#2.1"]
    steps = [
        StepOutput(tokens=(token(a, 1), token(b, 11), token(a, 2), token(a, 3)), prefilled=(a, b)),
        StepOutput(),
        StepOutput(tokens=(token(b, 12), token(a, 4), token(b, 13), token(b, None, FinishReason.STOP))),
    ]
    finished = [done.running.run_id for step in steps for done in table.take_output(step)]
    assert finished == ["b#2.1"]
    for run_id, tokens in (("a.1", [1, 2, 3, 4]), ("b#2.1", [11, 12, 13])):
        mine = [each for each in sent.deliveries if each.run_id == run_id]
        assert [token_id for each in mine for token_id in each.token_ids] == tokens
        assert [each.first_index for each in mine if each.token_ids] == list(range(len(tokens)))
        assert [each.batch.batch_id for each in mine] == ["x", *[""] * (len(mine) - 1)]
