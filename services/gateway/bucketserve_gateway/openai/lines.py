"""Lines of batches: what each of them asks for, and the line that it is answered with.

A batch is a job (bucketserve.store.jobs) whose note is a Note, whose requests are lines as they were sent, but for an
alias, and whose results are lines of its output file, or, where they are errors, of its error file.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar, cast

import orjson

from bucketserve.core.errors import BucketServeError, ForbiddenError, InvalidRequestError, UnknownModelError
from bucketserve.store.jobs import JobInfo
from bucketserve.v1 import common_pb2, inference_pb2, job_pb2
from bucketserve_gateway.admission import Room
from bucketserve_gateway.auth import Identity
from bucketserve_gateway.models import ModelCatalog
from bucketserve_gateway.openai.answers import Answer, gather
from bucketserve_gateway.openai.bodies import object_of, pieces_of
from bucketserve_gateway.openai.caller import Caller
from bucketserve_gateway.openai.errors import HttpError, ParameterError, body_of, status_of
from bucketserve_gateway.openai.fields import Fields
from bucketserve_gateway.openai.translation import Wanted, chat_completion, completion
from bucketserve_gateway.servicer import Generate
from bucketserve_gateway.submissions import OUTPUT_TOKEN_BYTES, Item, most_tokens

__all__ = ["BATCH_PREFIX", "DONE", "FAILED", "READERS", "BatchLines", "LineError", "Note"]

READERS = {"/v1/completions": completion, "/v1/chat/completions": chat_completion}
BATCH_PREFIX = "batch_"
DONE, FAILED = b"+", b"-"
"""Before a line as it is stored, where it has no line end: it is as long as with one."""
MAX_CUSTOM_ID_CHARACTERS = 512
LINE_BYTES, CHOICE_BYTES, LOGPROB_BYTES = 1024, 256, 96
"""What the answer to a line has beside its text: by itself, for each choice, and for each log-probability."""

LONG_READ_S = 0.005
"""A line that takes longer to read is followed by a pause."""

T = TypeVar("T")
Json = dict[str, Any]


class LineError(Exception):
    """A line is none of a batch."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        """Takes OpenAI's name for what is wrong, the same for people, and the parameter."""
        super().__init__(message)
        self.code = code
        self.param = param


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """What a batch is."""

    endpoint: str
    input_file_id: str
    window_s: int
    metadata: dict[str, str] | None = None
    errors: list[Json] = field(default_factory=list)
    """Why it was refused."""

    def to_bytes(self) -> bytes:
        """Returns it as it is stored."""
        return orjson.dumps(asdict(self))

    @classmethod
    def of(cls, job: JobInfo) -> Note:
        """Returns what a job's note says."""
        return cls(**orjson.loads(job.note))


class BatchLines:
    """The work of batches (job_runner.py)."""

    def __init__(self, generate: Generate, catalog: ModelCatalog) -> None:
        """Takes what serves, as the native API has it."""
        self._generate = generate
        self._catalog = catalog
        self._turn = asyncio.Lock()
        """To read a line, of which there is one at a time."""

    async def check(self, data: bytes, endpoint: str, identity: Identity) -> tuple[str, Item]:
        """Returns a line's custom_id, and the line as it will run: with the own name of the model that it is for now.

        A body that can't be served is no fault of the line: its answer will say so.

        Raises:
            LineError: the line is none of a batch for this endpoint, or asks for what its sender may not have.
        """
        return await self._read(lambda: self._checked(data, endpoint, identity))

    async def _read(self, read: Callable[[], T]) -> T:
        """Returns what read() returns; then others have a turn, and as long as it took if that was long."""
        async with self._turn:
            start_s = time.perf_counter()
            try:
                return read()
            finally:
                took_s = time.perf_counter() - start_s
                await asyncio.sleep(took_s if took_s > LONG_READ_S else 0)

    def _checked(self, data: bytes, endpoint: str, identity: Identity) -> tuple[str, Item]:
        custom_id, body = _parts_of(data, endpoint)
        try:
            wanted = _wanted(body, endpoint)
            num_tokens = 0
            for request in wanted.prompts:
                identity.permit(job_pb2.SubmitJobRequest(request=request))
                num_tokens += most_tokens(request, self._catalog) * wanted.num_each
            asked, own = wanted.prompts[0].model, self._catalog.get(wanted.prompts[0].model).card.name
            if asked != own:
                # By the time it runs the name may mean another model.
                named = {"custom_id": custom_id, "method": "POST", "url": endpoint, "body": {**body, "model": own}}
                data = orjson.dumps(named)
        except orjson.JSONEncodeError:
            raise LineError("invalid_json_line", "nested too deeply", "body") from None
        except UnknownModelError as error:
            raise LineError("model_not_found", str(error), "body.model") from None
        except ForbiddenError as error:
            raise LineError("forbidden", str(error), "body") from None
        except InvalidRequestError:
            return custom_id, Item(data, LINE_BYTES)
        response = wanted.prompts[0].response
        num_logprobs = 1 + response.num_logprobs if response.HasField("num_logprobs") else 0
        of_tokens = num_tokens * (OUTPUT_TOKEN_BYTES + num_logprobs * LOGPROB_BYTES)
        of_prompts = len(data) * wanted.num_each if wanted.is_echo else 0
        return custom_id, Item(data, LINE_BYTES + wanted.num_choices * CHOICE_BYTES + of_tokens + of_prompts)

    async def run(self, job: JobInfo, index: int, item: bytes, room: Room) -> bytes:
        """Returns the line that answers one. Its choices run one after the other: other jobs have a turn as well."""

        def read() -> tuple[Json, Wanted]:
            line = object_of(item)
            return line, _wanted(line.pop("body"), Note.of(job).endpoint)

        line, wanted = await self._read(read)
        # A name of its own: the scheduler may still know the run of a runner that is gone.
        request_id = f"{job.job_id}/{index}/{uuid.uuid4().hex[:8]}"
        for request in wanted.prompts:
            request.request_id, request.tenant = request_id, job.tenant
            request.request_class = common_pb2.REQUEST_CLASS_BATCH
            if not request.sampling.HasField("seed"):
                # Fixed, so that a request that is started again elsewhere draws the same.
                request.sampling.seed = index + 1
        started: list[inference_pb2.GenerateStarted] = []
        answer = Answer(wanted, self._catalog.get(wanted.prompts[0].model), started)
        for request, choice in zip(wanted.requests(), answer.choices, strict=True):
            run = cast(AsyncGenerator[inference_pb2.GenerateResponse, None], self._generate(request, {}, None))
            async with contextlib.aclosing(run):
                started.append((await anext(run)).started)
                await gather(choice, run, room)
        # For the line beside the choices that it is made of.
        room.grow(room.num_bytes)
        response = {"status_code": 200, "request_id": request_id, "body": answer.whole()}
        return DONE + _line(job, index, line, response, None)

    def failed(self, job: JobInfo, index: int, item: bytes, error: BucketServeError | None) -> bytes:
        """Returns the line that answers one that failed, or that the batch's end came before."""
        # The store may have lost it, and with it what its client calls it.
        line = object_of(item) if item else {"custom_id": None, "body": {}}
        if error is not None:
            body = body_of(error, _names(line["body"], Note.of(job).endpoint))
            response = {"status_code": status_of(error), "request_id": f"{job.job_id}/{index}", "body": body}
            return FAILED + _line(job, index, line, response, None)
        if job.stopped_unix_us:
            code, message = "batch_cancelled", "the batch was cancelled before this request was executed"
        else:
            code, message = "batch_expired", "this request could not be executed before the completion window expired"
        return FAILED + _line(job, index, line, None, {"code": code, "message": message})


def _parts_of(data: bytes, endpoint: str) -> tuple[str, Json]:
    """Returns custom_id and body of a line."""
    try:
        line = Fields(object_of(data))
        custom_id, method, url = line.text("custom_id"), line.text("method"), line.text("url")
        body = line.take("body")
        line.end()
    except HttpError as error:
        raise LineError("invalid_json_line", str(error)) from None
    except ParameterError as error:
        violation = error.violations[0]
        raise LineError(error.code or "invalid_request", violation.description, violation.field) from None
    for name, value in (("custom_id", custom_id), ("method", method), ("url", url), ("body", body)):
        if value is None:
            raise LineError("missing_required_parameter", "you must provide it", name)
    if not custom_id or len(custom_id) > MAX_CUSTOM_ID_CHARACTERS:
        raise LineError("invalid_custom_id", f"1 to {MAX_CUSTOM_ID_CHARACTERS} characters are needed", "custom_id")
    if method != "POST":
        raise LineError("invalid_method", "POST is needed", "method")
    if url != endpoint:
        raise LineError("invalid_url", f"the batch is for {endpoint}", "url")
    if not isinstance(body, dict):
        raise LineError("invalid_type", "invalid type: an object is needed", "body")
    return custom_id, body


def _wanted(body: Json, endpoint: str) -> Wanted:
    caller = Caller(metadata={}, tenant="", label="", slo=common_pb2.Slo())
    wanted = READERS[endpoint](body, caller)
    if wanted.is_stream:
        raise ParameterError("stream", "nothing of a batch is streamed", "invalid_value")
    return wanted


def _names(body: Json, endpoint: str) -> Mapping[str, str]:
    """Returns parameters by which the body gave fields of the native API."""
    try:
        return _wanted(body, endpoint).names
    except InvalidRequestError:
        return {}


def _line(job: JobInfo, index: int, line: Json, response: Json | None, error: Json | None) -> bytes:
    answer_id = f"batch_req_{job.job_id.removeprefix(BATCH_PREFIX)}{index:06x}"
    shown = {"id": answer_id, "custom_id": line["custom_id"], "response": response, "error": error}
    return b"".join(pieces_of(shown))
