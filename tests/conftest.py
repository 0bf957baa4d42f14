"""What holds for all tests: who runs beside whom, and how hypothesis runs.

`make test` runs the suite in several processes (pytest-xdist). A test marked `alone` measures what a neighbour would
disturb: it runs when no other test does, after all others. Tests whose mark `stack` asks for the same environment run
in one process, one after the other, and share the services (tests/e2e/conftest.py).
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import signal
import tempfile
from collections.abc import Generator

import hypothesis
import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# No deadline: how long an example takes depends on what else the machine does.
hypothesis.settings.register_profile("suite", deadline=None, print_blob=True)
hypothesis.settings.load_profile("suite")
# xdist tells its processes how wide the terminal is; what the commands print here is for tests, which have none.
os.environ.pop("COLUMNS", None)

LOCK = "PYTEST_NEIGHBOURS_LOCK"
"""Variable with the name of the lock file."""
ORDER = ("tests/e2e", "tests/integration", "tests/contract")
"""What takes longest begins first, so that no process is left with it at the end."""
STACK = re.compile(r"stack-[0-9a-f]{6}")
"""In the id of a test that shares a stack: which."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sorts the tests as they are to be given out; passes over those for which something is not installed."""

    def place(item: pytest.Item) -> tuple[bool, int, str]:
        path = item.path.relative_to(config.rootpath).as_posix()
        turn = next((i for i, prefix in enumerate(ORDER) if path.startswith(prefix)), len(ORDER))
        stack = STACK.search(item.nodeid)
        return item.get_closest_marker("alone") is not None, turn, stack[0] if stack else "tail"

    items.sort(key=place)
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(pytest.mark.skip(reason="vLLM has an environment of its own: make test-vllm"))


class Groups(LoadScopeScheduling):
    """Gives tests to processes one by one, those that share a stack together."""

    def _split_scope(self, nodeid: str) -> str:
        stack = STACK.search(nodeid)
        return stack[0] if stack else nodeid


@pytest.hookimpl
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Groups:
    """Says who gives out the tests, whatever --dist says: it can't know what they share."""
    config.option.loadscopereorder = False
    return Groups(config, log)


def pytest_configure(config: pytest.Config) -> None:
    """Sets, in the process that gives out the tests, what those which run them inherit."""
    if not hasattr(config, "workerinput"):
        # Run in the background, it would ignore these, and with it every service that it starts.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        # Several processes share the cores: none is to keep one busy with waiting for its other threads.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        if config.getoption("numprocesses", None):
            os.environ.setdefault("OMP_NUM_THREADS", "1")
        descriptor, name = tempfile.mkstemp(prefix="bucketserve-tests-")
        os.close(descriptor)
        os.environ[LOCK] = name
        config.add_cleanup(lambda: os.unlink(name))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Keeps tests marked alone apart from all others. Before a test's timeout begins to run: waiting is none of it."""
    with open(os.environ[LOCK], "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
        return (yield)
