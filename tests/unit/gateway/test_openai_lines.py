"""Lines of batches: which are some, what their answers may take, and what they are answered with."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from bucketserve.core.errors import OverloadedError, UnavailableError
from bucketserve.store.jobs import JobInfo
from bucketserve.v1 import common_pb2, inference_pb2
from bucketserve_gateway.auth import Identity, Keys
from bucketserve_gateway.models import ModelCatalog
from bucketserve_gateway.names import ModelNames
from bucketserve_gateway.openai.lines import DONE, FAILED, BatchLines, LineError, Note
from tests.unit.gateway.builders import an_admission, catalog

TEXT = "/v1/completions"
NOTE = Note(endpoint=TEXT, input_file_id="file-x", window_s=60)
JOB = JobInfo(
    job_id="batch_" + "0" * 32,
    state="running",
    tenant="t",
    num_requests=2,
    num_done=0,
    num_failed=0,
    ttl_s=60,
    created_unix_us=1,
    note=NOTE.to_bytes(),
)


class Model:
    """Says what it was asked for, and how many it answers at once."""

    def __init__(self) -> None:
        self.asked: list[inference_pb2.GenerateRequest] = []
        self.num_open = self.most_open = 0
        self.num_chunks = 1

    async def generate(
        self, request: inference_pb2.GenerateRequest, metadata: Mapping[str, str], remaining_s: float | None
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        self.asked.append(request)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            started = inference_pb2.GenerateStarted(request_id=request.request_id, model="demo", prompt_tokens=3)
            yield inference_pb2.GenerateResponse(started=started)
            for _ in range(self.num_chunks):
                await asyncio.sleep(0)
                text = f"{request.sampling.seed}" * self.num_chunks
                chunk = inference_pb2.GenerateChunk(text=text, token_ids=[1, 2])
                yield inference_pb2.GenerateResponse(chunk=chunk)
            finished = inference_pb2.GenerateFinished(reason=common_pb2.FINISH_REASON_LENGTH)
            yield inference_pb2.GenerateResponse(finished=finished)
        finally:
            self.num_open -= 1


def anybody() -> Identity:
    return Keys("").identify({})


def line(**body: Any) -> bytes:
    members = {"prompt": "a", "max_tokens": 10, **body}
    return json.dumps({"custom_id": "c", "method": "POST", "url": TEXT, "body": members}).encode()


async def run(lines: BatchLines, job: JobInfo, index: int, item: bytes) -> bytes:
    """Returns the answer to a line, which counts in full until it is stored."""
    admission = an_admission()
    with admission.room() as room:
        answer = await lines.run(job, index, item, room)
        # As what it was made of, too.
        assert 2 * len(answer) - 1000 < room.num_bytes < 2 * len(answer) + 2000
    return answer


async def test_a_line_for_whose_answer_there_is_no_room_ends_its_run() -> None:
    model, admission = Model(), an_admission(max_bytes=1000)
    model.num_chunks = 100
    with admission.room() as room:
        with pytest.raises(OverloadedError) as caught:
            await BatchLines(model.generate, catalog()).run(JOB, 0, line(n=3), room)
        assert caught.value.reason == "MAX_HELD_BYTES"
        # It would not even fit alone.
        assert room.is_too_small
    assert (len(model.asked), model.num_open, admission.num_bytes) == (1, 0, 0)


async def test_choices_of_a_line_run_one_after_the_other_and_are_the_same_again() -> None:
    model = Model()
    lines = BatchLines(model.generate, catalog())
    asked = line(prompt=["a", "b"], n=2, service_tier="priority")
    first, second = [await run(lines, JOB, 6, asked) for _ in range(2)]
    assert model.most_open == 1
    found = json.loads(first.removeprefix(DONE))
    assert [choice["text"] for choice in found["response"]["body"]["choices"]] == ["7", "8", "7", "8"]
    again = json.loads(second.removeprefix(DONE))["response"]
    assert again["body"]["choices"] == found["response"]["body"]["choices"]
    assert (found["custom_id"], found["error"], found["response"]["status_code"]) == ("c", None, 200)
    assert found["response"]["body"]["usage"]["total_tokens"] == 6 + 8
    for request in model.asked:
        assert (request.request_class, request.tenant) == (common_pb2.REQUEST_CLASS_BATCH, "t")
    # A run has a name of its own each time.
    assert found["response"]["request_id"] != again["request_id"]


async def test_what_fails_is_answered_as_alone_it_would_be() -> None:
    lines = BatchLines(Model().generate, catalog())
    found = json.loads(
        lines.failed(JOB, 0, line(), UnavailableError("gone", reason="ATTEMPTS_EXHAUSTED")).removeprefix(FAILED)
    )
    assert found["response"]["status_code"] == 503
    assert found["response"]["body"]["error"]["code"] == "attempts_exhausted"
    lost = json.loads(lines.failed(JOB, 0, b"", UnavailableError("lost", reason="REQUEST_LOST")).removeprefix(FAILED))
    assert (lost["custom_id"], lost["response"]["status_code"]) == (None, 503)
    assert json.loads(lines.failed(JOB, 0, b"", None).removeprefix(FAILED))["error"]["code"] == "batch_expired"
    ended = json.loads(lines.failed(JOB, 0, line(), None).removeprefix(FAILED))
    assert (ended["response"], ended["error"]["code"]) == (None, "batch_expired")


async def test_room_is_taken_for_what_an_answer_may_have() -> None:
    lines = BatchLines(Model().generate, catalog())

    async def most(**body: Any) -> int:
        return (await lines.check(line(**body), TEXT, anybody()))[1].most_output_bytes

    small = await most()
    assert await most(max_tokens=50) > small
    assert await most(n=8) > 6 * (small - 1024)
    assert await most(logprobs=5) > small + 10 * 5 * 50
    assert await most(prompt=["a"] * 20) > small + 20 * 10
    assert await most(echo=True, prompt="x" * 500, n=3) > await most(prompt="x" * 500, n=3) + 1500
    # What can't run takes the room of an error.
    assert await most(suffix="x") < small


async def test_a_line_runs_on_the_model_that_its_name_meant_when_it_was_sent() -> None:
    models = {"demo": catalog().get("demo"), "other": catalog("other").get("other")}
    model, (before, after) = Model(), (ModelCatalog(models, ModelNames(models, {"latest": name})) for name in models)
    lines = BatchLines(model.generate, before)
    _, item = await lines.check(line(model="latest", user="größe"), TEXT, anybody())
    await run(BatchLines(model.generate, after), JOB, 0, item.data)
    assert [request.model for request in model.asked] == ["demo"]
    for name in models:
        # What has the model's own name stays as it was sent.
        assert (await lines.check(line(model=name), TEXT, anybody()))[1].data == line(model=name)


async def test_a_line_that_can_be_read_and_not_written_is_none() -> None:
    models = {"demo": catalog().get("demo")}
    lines = BatchLines(Model().generate, ModelCatalog(models, ModelNames(models, {"latest": "demo"})))
    schema = json.loads('{"items":' * 251 + "{}" + "}" * 251)
    form = {"type": "json_schema", "json_schema": {"name": "deep", "schema": schema}}
    for name, is_line in (("demo", True), ("latest", False)):
        with contextlib.nullcontext() if is_line else pytest.raises(LineError, match="nested too deeply"):
            await lines.check(line(model=name, response_format=form), TEXT, anybody())


@pytest.mark.parametrize("body", [[], None, "x", 5])
async def test_a_body_that_is_none_is_said(body: Any) -> None:
    data = json.dumps({"custom_id": "c", "method": "POST", "url": TEXT, "body": body}).encode()
    with pytest.raises(LineError) as caught:
        await BatchLines(Model().generate, catalog()).check(data, TEXT, anybody())
    assert caught.value.param == "body"
