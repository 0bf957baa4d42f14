"""`bucketserve status`: what is shown of models, pools and workers."""

from __future__ import annotations

from rich.console import Console

from bucketserve.v1 import common_pb2, scheduler_pb2
from bucketserve_cli.status import status_view


def worker(name: str, engine: str, role: common_pb2.WorkerRole, num_running: int) -> scheduler_pb2.WorkerStatus:
    report = scheduler_pb2.WorkerReport(kv_free_tokens=1000, kv_total_tokens=4000, num_running=num_running)
    return scheduler_pb2.WorkerStatus(worker_id=name, engine=engine, role=role, report=report)


def shown(*models: scheduler_pb2.ModelStatus) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(status_view(scheduler_pb2.GetStatusResponse(models=models)))
    return capture.get()


def test_a_model_of_several_pools_has_a_row_for_each() -> None:
    both, decode = common_pb2.WORKER_ROLE_BOTH, common_pb2.WORKER_ROLE_DECODE
    lines = shown(
        scheduler_pb2.ModelStatus(
            model="chat",
            workers=[worker("a", "vllm", both, 1), worker("b", "vllm", both, 2), worker("c", "fake", decode, 4)],
        )
    ).splitlines()
    rows = [line.split() for line in lines]
    pools = rows[next(i for i, row in enumerate(rows) if row[:1] == ["pool"]) + 1 :][:2]
    assert pools == [
        ["both", "vllm", "2", "2,000", "tokens", "8,000", "tokens", "3", "0"],
        ["decode", "fake", "1", "1,000", "tokens", "4,000", "tokens", "4", "0"],
    ]


def test_a_model_of_one_pool_has_its_workers_and_one_without_any_says_so() -> None:
    both = common_pb2.WORKER_ROLE_BOTH
    text = shown(
        scheduler_pb2.ModelStatus(model="[red]one[/]", workers=[worker("a", "fake", both, 1)]),
        scheduler_pb2.ModelStatus(model="two"),
    )
    assert "model [red]one[/]" in text
    assert "pool" not in text
    assert "none" in text.rpartition("model two")[2]
