"""Stacks of real processes for the tests, and the check that a test leaves nothing behind in one.

A test that needs a stack says of what kind:

    @pytest.mark.stack(num_workers=2, environ=SLOW)
    async def test_something(stack: LocalStack) -> None: ...

Tests with an equal mark share one stack; what a test has ended or killed is started again after it. The mark takes what
StackSpec takes; without it: the fake engine, the demo model, a context of 2,048 tokens. To a test a shared stack looks
as if it had just started: metric() counts from zero, events() are its own (tests/e2e/observe.py). It does see what
others left in the store on purpose, such as finished jobs: choose names of your own.

`new_stack(...)` starts one with the same arguments for one test alone: for a store of the test's own, for what is
known only at run time, and for what must be seen from the start.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import json
from collections.abc import Callable, Coroutine, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest

from bucketserve_cli.stack import LocalStack, StackSpec
from tests.chaos.checks import Usage, leaks, warm_up
from tests.conftest import STACK
from tests.e2e.observe import begin, eventually

DEMO_MODEL = str(Path(__file__).resolve().parents[2] / "models" / "demo" / "model")
HAS_FAILED = pytest.StashKey[bool]()
SHARED = pytest.StashKey["Shared"]()

T = TypeVar("T")
NewStack = Callable[..., LocalStack]


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs it in a loop of its own, also within a test that is a coroutine itself."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


class _Started:
    """A stack that runs, and what its services held when it was quiet for the first time."""

    def __init__(self, log_dir: Path, options: Mapping[str, object]) -> None:
        environ = {"BUCKETSERVE_WORKER_CONTEXT_TOKENS": "2048", **options.get("environ", {})}
        self.options = options
        self.stack = LocalStack(
            StackSpec(**{"model": DEMO_MODEL, "engine": "fake", **options, "environ": environ, "log_dir": log_dir})
        )
        self.stack.__enter__()
        try:
            self._first: Mapping[str, Usage] = _run(warm_up(self.stack))
        except BaseException:
            self.stop()
            raise
        begin(self.stack)

    def check(self) -> None:
        """Starts again what the test ended; then nothing may be left: no KV, lease, key, request, file or task.

        What the store still has of the work of services that were ended shows only when they are back.
        """
        for name, service in list(self.stack.services.items()):
            if service.exit_status is not None:
                self.stack.restart(name)
        # Also for those that the test itself has just started again.
        self.stack.wait_until_serving()
        _run(self._nothing_is_left())

    async def _nothing_is_left(self) -> None:
        left: list[str] = []

        async def is_clean() -> bool:
            try:
                left[:] = await leaks(self.stack, self._first)
            except (AssertionError, grpc.aio.AioRpcError, OSError) as error:
                # Nobody leads yet.
                left[:] = [f"not to be seen: {error!r}"]
            if left:
                # An error that a test has caught may hold its call, and that a connection, until its cycle is found.
                gc.collect()
            return not left

        try:
            await eventually(is_clean, 30)
        except AssertionError:
            raise AssertionError(f"left behind: {left}") from None

    def stop(self) -> None:
        """Ends all its processes."""
        self.stack.__exit__(None, None, None)


class Shared:
    """The stack that tests of this process share; there is one at a time."""

    def __init__(self, folder: pytest.TempPathFactory) -> None:
        self._folder = folder
        self._running: _Started | None = None

    def get(self, options: Mapping[str, object]) -> _Started:
        """Returns a stack of that kind: the one that runs, or else a new one in its place."""
        if self._running is None or self._running.options != options:
            self.stop()
            self._running = _Started(self._folder.mktemp("stack"), options)
        return self._running

    def stop(self) -> None:
        """Ends it, if one runs."""
        if self._running is not None:
            self._running.stop()
            self._running = None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[HAS_FAILED] = item.stash.get(HAS_FAILED, False) or report.failed
    return report


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """Starts stacks that several tests use."""
    stacks = request.session.stash[SHARED] = Shared(tmp_path_factory)
    yield stacks
    stacks.stop()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Puts into the id of a test which stack it shares: by the id tests are given to processes (tests/conftest.py)."""
    if "stack" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("stack")
        options = mark.kwargs if mark else {}
        digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:6]
        metafunc.parametrize("stack", [pytest.param(options, id=f"stack-{digest}")], indirect=True)


@pytest.fixture
def stack(request: pytest.FixtureRequest, shared: Shared) -> Iterator[LocalStack]:
    """The stack that the test's mark describes; after the test it must hold nothing."""
    started = shared.get(request.param)
    begin(started.stack)
    yield started.stack
    if request.node.stash.get(HAS_FAILED, False):
        # Nobody else is to suffer from what it left.
        shared.stop()
        return
    try:
        started.check()
    except BaseException:
        shared.stop()
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, None, None]:
    """Ends a shared stack after the last test that wants it."""
    yield
    of_this, of_next = (STACK.search(each.nodeid if each else "") for each in (item, nextitem))
    # There is none if all its tests were passed over.
    stacks = item.session.stash.get(SHARED, None)
    if stacks and of_this and (of_next is None or of_next[0] != of_this[0]):
        stacks.stop()


@pytest.fixture
def stores() -> Iterator[contextlib.ExitStack]:
    """For stores of a test's own: they end after the stacks."""
    with contextlib.ExitStack() as exits:
        yield exits


@pytest.fixture
def new_stack(tmp_path: Path, stores: contextlib.ExitStack) -> Iterator[NewStack]:
    """Returns a function that starts a stack for this test alone; after the test it must hold nothing."""
    running: list[_Started] = []

    def start(**options) -> LocalStack:
        running.append(_Started(tmp_path / f"logs{len(running)}", options))
        return running[-1].stack

    yield start
    try:
        for started in running:
            started.check()
    finally:
        for started in running:
            started.stop()
