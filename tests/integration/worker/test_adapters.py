"""The adapters' directory beside a real engine thread: each look as it is, without waiting for the next."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from bucketserve.core.errors import EngineError
from bucketserve.core.types import RequestId
from bucketserve.engine.fake import FakeEngine, FakeSettings
from bucketserve.engine.fingerprint import adapter_fingerprint
from bucketserve.ports import SequenceSpec
from bucketserve.v1 import scheduler_pb2
from bucketserve_worker import adapters
from bucketserve_worker.adapters import AdapterDirectory
from bucketserve_worker.engine_thread import EngineThread, EngineTurn
from tests.adapters import write_adapter
from tests.e2e.conftest import DEMO_MODEL
from tests.e2e.observe import eventually

MODEL = Path(DEMO_MODEL)
MOST = 3


class Watched:
    """A directory, an engine that looks at it, and what was said."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.turns: list[EngineTurn] = []
        self.said: list[list[tuple[str, str]]] = []
        self.refused: list[tuple[str, str]] = []
        self.unloaded: list[str] = []
        self.engine = EngineThread(lambda: FakeEngine(FakeSettings(max_adapters=MOST, step_s=0.01)), self.turns.append)
        telemetry = SimpleNamespace(
            adapter_loaded=lambda name, fingerprint: None,
            adapter_unloaded=self.unloaded.append,
            adapter_refused=lambda name, problem: self.refused.append((name, problem)),
        )
        self.adapters = AdapterDirectory(str(directory), self.engine, self._changed, telemetry)

    def _changed(self, message: scheduler_pb2.WorkerAdapters) -> None:
        self.said.append([(adapter.name, adapter.fingerprint) for adapter in message.adapters])

    def write(self, name: str, seed: int) -> str:
        """Writes an adapter; returns its fingerprint."""
        return adapter_fingerprint(write_adapter(self.directory / name, MODEL, seed))

    async def look(self, number: int = 1) -> dict[str, str]:
        """Looks so many times; returns what is served then."""
        for _ in range(number):
            await self.adapters.look(is_first=False)
        return {adapter.name: adapter.fingerprint for adapter in self.adapters.served().adapters}


@pytest.fixture
async def watched(tmp_path: Path) -> AsyncIterator[Watched]:
    (tmp_path / "there").mkdir()
    found = Watched(tmp_path / "there")
    found.engine.start()
    await found.engine.started
    yield found
    await found.engine.stop()


async def test_at_first_what_is_there_is_served_and_later_what_stays_as_it_is(watched: Watched) -> None:
    one = watched.write("one", 1)
    await watched.adapters.look()
    assert watched.said == [[("one", one)]]
    two = watched.write("two", 2)
    assert await watched.look() == {"one": one}
    assert await watched.look() == {"one": one, "two": two}
    assert await watched.look() == {"one": one, "two": two}
    assert len(watched.said) == 2


async def test_names_that_no_request_could_name_are_nobody_s(watched: Watched, tmp_path: Path) -> None:
    valid = ["x" * 64, "v1.2_b-c"]
    for seed, name in enumerate((*valid, "x" * 65, ".hidden", "a:b", "a b", "-x", "\u00e4", "_")):
        if name == ".hidden":
            write_adapter(tmp_path / "h", MODEL, seed).rename(watched.directory / name)
        else:
            watched.write(name, seed)
    (watched.directory / "file").write_text("no directory")
    os.mkfifo(watched.directory / "fifo")
    (watched.directory / "dangling").symlink_to(tmp_path / "nowhere")
    assert sorted(await watched.look(2)) == sorted(valid)
    assert watched.refused == []


async def test_what_was_loaded_last_is_served_until_what_is_new_can_be(watched: Watched) -> None:
    one = watched.write("one", 1)
    await watched.adapters.look()
    weights = watched.directory / "one" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    assert await watched.look(3) == {"one": one}
    ((name, problem),) = watched.refused
    assert (name, "truncated" in problem) == ("one", True)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    new = adapter_fingerprint(weights.parent)
    assert await watched.look(2) == {"one": new}
    # Gateways that have not heard of it yet still mean the former one.
    assert watched.said[-1] == [("one", one), ("one", new)]
    assert watched.unloaded == []
    await watched.look(2)
    assert (watched.said[-1], watched.unloaded) == ([("one", new)], [one])


async def test_one_that_is_used_is_unloaded_after_its_use(watched: Watched) -> None:
    one = watched.write("one", 1)
    await watched.adapters.look()
    spec = SequenceSpec(request_id=RequestId("r"), token_ids=(1, 2), max_new_tokens=8_000, adapter=one)
    watched.engine.add(1, [spec], 0, specs={})
    await eventually(lambda: watched.turns)
    shutil.rmtree(watched.directory / "one")
    assert await watched.look() == {}
    await watched.look(3)
    assert watched.unloaded == []
    watched.engine.cancel([RequestId("r")])
    await watched.look()
    assert watched.unloaded == [one]
    # One that comes after all may go on elsewhere.
    watched.turns.clear()
    watched.engine.add(2, [spec], 0, specs={})
    await eventually(lambda: any(turn.output.failures for turn in watched.turns))
    (failure,) = [failure for turn in watched.turns for failure in turn.output.failures]
    assert failure.is_retryable


async def test_one_that_can_not_be_unloaded_now_is_unloaded_later_and_ends_nothing(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = watched.write("one", 1), watched.write("two", 2)
    await watched.adapters.look()
    with monkeypatch.context() as broken:

        def unload(engine: FakeEngine, fingerprint: str) -> bool:
            raise EngineError("not now")

        broken.setattr(FakeEngine, "unload_adapter", unload)
        shutil.rmtree(watched.directory / "one")
        assert await watched.look(3) == {"two": two}
        assert watched.unloaded == []
    await watched.look()
    assert watched.unloaded == [one]


async def test_what_is_too_many_is_told_and_served_when_there_is_room(watched: Watched) -> None:
    for seed, name in enumerate("abcd"):
        watched.write(name, seed)
    assert sorted(await watched.look(2)) == ["a", "b", "c"]
    assert [name for name, _ in watched.refused] == ["d"]
    assert "max_adapters" in watched.refused[0][1]
    shutil.rmtree(watched.directory / "b")
    assert sorted(await watched.look(4)) == ["a", "c", "d"]


async def test_new_files_for_which_there_was_no_room_are_served_when_there_is(watched: Watched) -> None:
    for seed, name in enumerate("abc"):
        watched.write(name, seed)
    await watched.adapters.look()
    shutil.rmtree(watched.directory / "c")
    new = watched.write("c", 9)
    former = (await watched.look(4))["c"]
    assert (former != new, [name for name, _ in watched.refused]) == (True, ["c"])
    shutil.rmtree(watched.directory / "b")
    assert (await watched.look(4))["c"] == new
    assert [name for name, _ in watched.refused] == ["c"]


@pytest.mark.parametrize("is_an_update", [False, True])
async def test_files_that_could_not_be_read_are_tried_again_and_told_once(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, is_an_update: bool
) -> None:
    if is_an_update:
        watched.write("one", 1)
    await watched.adapters.look()
    shutil.rmtree(watched.directory / "one", ignore_errors=True)
    new = watched.write("one", 2)
    real, num_reads = Path.read_bytes, 0

    def read_bytes(path: Path) -> bytes:
        nonlocal num_reads
        if path.parent.name != "one":
            return real(path)
        num_reads += 1
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken:
        broken.setattr(Path, "read_bytes", read_bytes)
        before = await watched.look(4)
        assert (before.get("one") is not None, num_reads) == (is_an_update, 1)
        broken.setattr(adapters, "RETRY_S", 0.0)
        # Something else is unloaded: all that failed is tried again.
        watched.write("other", 3)
        await watched.look(2)
        shutil.rmtree(watched.directory / "other")
        await watched.look(6)
        assert num_reads > 3
        assert await watched.look() == before
    assert [name for name, _ in watched.refused] == ["one"]
    assert (await watched.look(2))["one"] == new


async def test_what_is_wrong_with_files_stays_so_until_they_change(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "RETRY_S", 0.0)
    watched.write("one", 1)
    config = watched.directory / "one" / "adapter_config.json"
    config.write_text("{}")
    num_looked_into = 0

    def fingerprint(directory: Path) -> str:
        nonlocal num_looked_into
        num_looked_into += 1
        return adapter_fingerprint(directory)

    monkeypatch.setattr(adapters, "adapter_fingerprint", fingerprint)
    assert await watched.look(6) == {}
    assert (num_looked_into, len(watched.refused)) == (1, 1)
    config.write_text('{"peft_type": "LORA"}')
    assert list(await watched.look(2)) == ["one"]


async def test_one_adapter_under_two_names_is_one(watched: Watched) -> None:
    one = watched.write("one", 1)
    shutil.copytree(watched.directory / "one", watched.directory / "same")
    assert await watched.look(2) == {"one": one, "same": one}
    shutil.rmtree(watched.directory / "one")
    assert await watched.look(4) == {"same": one}
    assert watched.unloaded == []


async def test_what_can_not_be_looked_at_harms_nothing_else(watched: Watched) -> None:
    (watched.directory / "bad").symlink_to("x" * 300)
    one = watched.write("one", 1)
    assert await watched.look(3) == {"one": one}
    assert [name for name, _ in watched.refused] == ["bad"]


async def test_a_directory_that_can_not_be_read_for_a_while_changes_nothing(watched: Watched) -> None:
    one = watched.write("one", 1)
    await watched.adapters.look()
    away = watched.directory.rename(watched.directory.with_name("away"))
    assert await watched.look(3) == {"one": one}
    away.rename(watched.directory)
    assert await watched.look(3) == {"one": one}
    assert (watched.unloaded, watched.refused) == ([], [])
