"""Stacks of real processes for the tests, and the check that a test leaves nothing behind in one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from bucketserve_cli.stack import LocalStack, StackSpec
from tests.chaos.checks import leaks, usage
from tests.e2e.observe import eventually

DEMO_MODEL = str(Path(__file__).resolve().parents[2] / "models" / "demo" / "model")

NewStack = Callable[..., LocalStack]


@pytest.fixture
def stores() -> Iterator[contextlib.ExitStack]:
    """For stores of a test's own: they end after the stacks."""
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def new_stack(tmp_path: Path, stores: contextlib.ExitStack) -> Iterator[NewStack]:
    """Returns a function that starts a stack, by default with the fake engine; all stop at the end of the test.

    Then it must hold nothing: no KV, lease, key, request, file or task. Services that a test ended are started again
    first, so that what the store still has of their work shows as well.
    """
    stacks: list[LocalStack] = []
    before: list[dict[str, dict[str, float]]] = []

    def start(**options) -> LocalStack:
        environ = {"BUCKETSERVE_WORKER_CONTEXT_TOKENS": "2048", **options.pop("environ", {})}
        spec = StackSpec(
            model=DEMO_MODEL, log_dir=tmp_path / f"logs{len(stacks)}", environ=environ, **{"engine": "fake", **options}
        )
        stack = LocalStack(spec)
        stacks.append(stack)
        stack.__enter__()
        before.append(usage(stack))
        return stack

    yield start
    try:
        for stack, at_start in zip(stacks, before, strict=True):
            ended = [name for name, service in stack.services.items() if service.exit_status is not None]
            for name in ended:
                stack.restart(name)
            # Also for those that the test itself has just started again.
            stack.wait_until_serving(60)
            asyncio.run(_check_nothing_is_left(stack, at_start))
    finally:
        for stack in stacks:
            stack.__exit__(None, None, None)


async def _check_nothing_is_left(stack: LocalStack, before: dict[str, dict[str, float]]) -> None:
    left: list[str] = []

    async def is_clean() -> bool:
        try:
            left[:] = await leaks(stack, stack.redis_url, before)
        except (AssertionError, grpc.aio.AioRpcError, OSError) as error:
            # Nobody leads yet.
            left[:] = [f"not to be seen: {error!r}"]
        return not left

    try:
        await eventually(is_clean, 30)
    except AssertionError:
        raise AssertionError(f"left behind: {left}") from None
