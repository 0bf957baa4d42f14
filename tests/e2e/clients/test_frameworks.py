"""LangChain and LiteLLM over OpenAI's API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bucketserve_cli.stack import LocalStack
from tests.e2e.clients.environment import seen
from tests.e2e.conftest import NewStack
from tests.e2e.observe import eventually, metric
from tests.e2e.openai_client import by_grpc
from tests.e2e.test_cancellation import nothing_runs
from tests.e2e.test_openai_failures import SMALL
from tests.e2e.test_stack import SLOW
from tests.e2e.test_tls import Locked

pytestmark = [pytest.mark.e2e, pytest.mark.clients, pytest.mark.parametrize("library", ["langchain", "litellm"])]

PROMPT = "Tell me of the king"
# How each calls what went wrong.
ERRORS = {
    "langchain": {
        "too many tokens": "ModelInvalidRequestError",
        "a prompt too long for them": "OpenAIContextOverflowError",
        "unknown model": "ModelNotFoundError",
        "unknown parameter": "ModelInvalidRequestError",
        "too late": "ModelTimeoutError",
    },
    "litellm": {
        "too many tokens": "BadRequestError",
        "a prompt too long for them": "ContextWindowExceededError",
        "unknown model": "NotFoundError",
        "unknown parameter": "BadRequestError",
        "too late": "Timeout",
    },
}


async def use(library: str, stack: LocalStack, what: str, scheme: str = "http", **environ: object) -> Any:
    return await seen("python", "frameworks.py", library, f"{scheme}://{stack.http_address}/v1", what, **environ)


@pytest.mark.stack(environ=SLOW)
async def test_text_is_that_of_our_client(library: str, stack: LocalStack) -> None:
    found = await use(library, stack, "texts")
    same = {"max_tokens": 20, "ignore_eos": True}
    chat = await by_grpc(stack, chat=[("user", PROMPT)], **same)
    assert len(found["chats"]) >= 4 and set(found["chats"]) == {chat}
    assert found["completions"] == [await by_grpc(stack, prompt=PROMPT, **same)] * 2
    assert min(found["pieces"]) > 1
    assert (found["tokens"], found["reason"]) == ([20, 20], "length")


@pytest.mark.stack(engine="transformers")
async def test_structures_and_tools_are_what_was_asked_for(library: str, stack: LocalStack) -> None:
    found = await use(library, stack, "structures")
    people = [each["parsed"] for each in found["structured"].values()]
    assert {each["kind"] for each in found["structured"].values()} == {"Person"}, found
    assert [each["error"] for each in found["structured"].values()] == [None] * len(people)
    assert [name for name, _ in found["called"]] == ["Person"] and found["reason"] == "tool_calls"
    assert found["streamed"] == found["called"]
    for person in [*people, found["called"][0][1]]:
        assert person.keys() == {"name", "kind", "age"} and person["kind"] in ("king", "prophet")
        assert len(person["name"]) <= 12 and (person["age"] is None or 0 <= person["age"] <= 999)


@pytest.mark.stack(environ=SLOW)
async def test_a_stream_that_is_left_leaves_nothing(library: str, stack: LocalStack) -> None:
    await use(library, stack, "leave")
    await eventually(lambda: nothing_runs(stack), 10)
    assert metric(stack, "gateway", "bucketserve_gateway_requests_total", outcome="cancelled") == 1


@pytest.mark.stack(environ=SLOW)
async def test_errors_are_the_librarys_own(library: str, stack: LocalStack) -> None:
    found = await use(library, stack, "errors")
    assert {what: kind for what, kind in ERRORS[library].items() if kind not in found[what]["kinds"]} == {}
    assert "exceed the context of 2048" in found["too many tokens"]["message"]
    assert "unknown model 'nobody'" in found["unknown model"]["message"]
    assert "unheard_of" in found["unknown parameter"]["message"]
    await eventually(lambda: nothing_runs(stack), 10)


@pytest.mark.stack(environ=SMALL)
async def test_overload_is_a_rate_limit_that_passes(library: str, stack: LocalStack) -> None:
    seen = await use(library, stack, "overload")
    refused = [each for each in seen["found"] if each]
    assert 10 <= len(refused) <= 26
    assert {each["status"] for each in refused} == {429}
    assert all("RateLimitError" in each["kinds"] for each in refused)
    assert seen["served"] == [20] * 12


async def test_certificates_and_keys(library: str, new_stack: NewStack, tmp_path: Path) -> None:
    locked = Locked(tmp_path / "locked")
    stack = new_stack(environ=locked.environ)
    trusted = {"SSL_CERT_FILE": locked.papers.ca}
    assert await use(library, stack, "call", "https", API_KEY=locked.keys["acme"], **trusted) == {}
    wrong = await use(library, stack, "call", "https", API_KEY="x" * 43, **trusted)
    assert wrong["status"] == 401 and "AuthenticationError" in wrong["kinds"]
    stranger = await use(library, stack, "call", "https", API_KEY=locked.keys["acme"])
    assert "APIConnectionError" in stranger["kinds"] or "InternalServerError" in stranger["kinds"]
