"""Pages of files and batches count as held until they are sent."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from bucketserve.core.errors import OverloadedError
from bucketserve.store.files import FileInfo
from bucketserve.store.jobs import JobInfo
from bucketserve_gateway.admission import Admission
from bucketserve_gateway.openai.batches import BATCHES, Batches
from bucketserve_gateway.openai.bodies import pieces_of
from bucketserve_gateway.openai.exchange import Exchange
from bucketserve_gateway.openai.files import FILES, Files, Shelves
from bucketserve_gateway.openai.lines import Note
from tests.unit.gateway.builders import an_admission

NUMBER = 100


class Page(Exchange):
    """Keeps what is answered, and what was held as it was."""

    def __init__(self, path: str, admission: Admission) -> None:
        scope = {"method": "GET", "path": path, "query_string": b"limit=100", "headers": [], "client": None}

        async def nothing(*_: Any) -> None:
            return None

        super().__init__(scope, nothing, nothing)
        self._admission = admission
        self.data = b""
        self.num_held = 0

    async def answer(self, status: int, document: Any, headers: Any = ()) -> None:
        self.data, self.num_held = b"".join(pieces_of(document)), self._admission.num_bytes


class Store:
    """Has so many files and batches, by number."""

    def __init__(self) -> None:
        self.store = self

    async def page(self, tenant: str, after: str, most: int, **_: Any) -> list[str]:
        first = int(after, 16) + 1 if after else 0
        return [f"{number:032x}" for number in range(first, min(first + most, NUMBER))]

    async def get_many(self, names: list[str]) -> list[Any]:
        return [self._batch(name) if name.startswith("batch_") else self._file(name) for name in names]

    @staticmethod
    def _file(name: str) -> FileInfo:
        return FileInfo(
            file_id=name,
            tenant="t",
            name="a" * 250,
            num_bytes=1,
            num_pieces=1,
            created_unix_us=1,
            expires_unix_us=1,
        )

    @staticmethod
    def _batch(name: str) -> JobInfo:
        note = Note(endpoint="/", input_file_id="f", window_s=1, metadata={str(i): "x" * 500 for i in range(16)})
        return JobInfo(
            job_id=name,
            state="running",
            tenant="t",
            num_requests=1,
            num_done=0,
            num_failed=0,
            ttl_s=1,
            created_unix_us=1,
            note=note.to_bytes(),
        )


async def list_of(kind: str, admission: Admission) -> Page:
    store: Any = Store()
    files = Files(Shelves(store, store, store), store, admission, 1000)
    page = Page(FILES if kind == "files" else BATCHES, admission)
    if kind == "files":
        await files.serve(page, "t")
        return page
    lines: Any = None
    batches = Batches(files, store, store, lines, max_lines=10, max_line_bytes=1000)
    identity: Any = None
    with admission.room() as room:
        await batches.serve(page, "t", identity, b"", room)
    return page


@pytest.mark.parametrize("kind", ["files", "batches"])
async def test_a_page_counts_as_held(kind: str) -> None:
    admission = an_admission(max_bytes=10 << 20)
    page = await list_of(kind, admission)
    assert len(orjson.loads(page.data)["data"]) == NUMBER
    assert page.num_held > 2 * len(page.data) - NUMBER * 200
    assert admission.num_bytes == 0
    with admission.room() as others:
        others.resize((10 << 20) - 1000)
        with pytest.raises(OverloadedError):
            await list_of(kind, admission)
    assert admission.num_bytes == 0
