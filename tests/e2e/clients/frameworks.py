"""A client with LangChain and one with LiteLLM, in the environment of `make test-clients`, which has not our packages.

`python frameworks.py LIBRARY URL WHAT` does one of the things below and prints what it saw as JSON. API_KEY is a
client's.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

KEY = os.environ.get("API_KEY", "-")
PROMPT = "Tell me of the king"
CHAT: list[Any] = [{"role": "user", "content": PROMPT}]
TOKENS, LONG = 20, 1500
IGNORE_EOS = {"ignore_eos": True}


class Person(BaseModel):
    """A person."""

    # The demo model would go on with properties of its own.
    model_config = ConfigDict(extra="forbid")
    name: str = Field(description="what they are called", max_length=12)
    kind: Literal["king", "prophet"]
    age: int | None = Field(ge=0, le=999)


class LangChain:
    """langchain-openai's ChatOpenAI and OpenAI."""

    def __init__(self, url: str) -> None:
        from langchain_openai import ChatOpenAI, OpenAI

        same: dict[str, Any] = {
            "base_url": url,
            "api_key": KEY,
            "model": "demo",
            "temperature": 0,
            "extra_body": IGNORE_EOS,
        }
        self.make: Callable[..., Any] = lambda **more: ChatOpenAI(
            **{**same, "max_tokens": TOKENS, "max_retries": 0, **more}
        )
        self.completion = OpenAI(**same, max_tokens=TOKENS, max_retries=0)

    async def texts(self) -> object:
        chat = self.make(stream_usage=True)
        whole, pieces = chat.invoke(PROMPT), list(chat.stream(PROMPT))
        later = [piece async for piece in chat.astream(PROMPT)]
        batch = await chat.abatch([PROMPT, PROMPT])
        return {
            "chats": [
                whole.content,
                (await chat.ainvoke(PROMPT)).content,
                "".join(piece.content for piece in pieces),
                "".join(piece.content for piece in later),
                *(each.content for each in batch),
            ],
            "pieces": [len([piece for piece in found if piece.content]) for found in (pieces, later)],
            "tokens": [whole.usage_metadata["output_tokens"], sum_of(pieces).usage_metadata["output_tokens"]],
            "reason": whole.response_metadata["finish_reason"],
            "completions": [
                self.completion.invoke(PROMPT),
                "".join([piece async for piece in self.completion.astream(PROMPT)]),
            ],
        }

    async def structures(self) -> object:
        """What its users ask for by a model of pydantic's: an answer, and the call of a tool."""
        chat = self.make(max_tokens=300)
        found = {}
        for method in ("json_schema", "function_calling"):
            for strict in (None, True):
                asked = chat.with_structured_output(Person, method=method, strict=strict, include_raw=True)
                answer = await asked.ainvoke(PROMPT)
                found[f"{method}, {strict}"] = {
                    "parsed": answer["parsed"] and answer["parsed"].model_dump(),
                    "error": answer["parsing_error"] and str(answer["parsing_error"]),
                    "kind": type(answer["parsed"]).__name__,
                }
        bound = chat.bind_tools([Person], tool_choice="required")
        called = await bound.ainvoke(PROMPT)
        pieces = [piece async for piece in bound.astream(PROMPT)]
        return {
            "structured": found,
            "called": [[call["name"], call["args"]] for call in called.tool_calls],
            "streamed": [[call["name"], call["args"]] for call in sum_of(pieces).tool_calls],
            "reason": called.response_metadata["finish_reason"],
        }

    async def one(
        self, *, retries: int = 0, max_tokens: int = TOKENS, timeout: float | None = None, **more: Any
    ) -> Any:
        chat = self.make(max_retries=retries, max_tokens=max_tokens, timeout=timeout, **more)
        return (await chat.ainvoke(PROMPT)).usage_metadata["output_tokens"]

    async def leave(self) -> None:
        stream = self.make(max_tokens=LONG).astream(PROMPT)
        async for piece in stream:
            if piece.content:
                break
        await stream.aclose()


class LiteLLM:
    """LiteLLM with BucketServe as one of the servers that it knows as "OpenAI-compatible"."""

    def __init__(self, url: str) -> None:
        # It would fetch prices of models otherwise.
        os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
        import litellm

        # What it prints would be among what is printed here.
        litellm.suppress_debug_info = True
        self.litellm = litellm
        self.same: dict[str, Any] = {"api_base": url, "api_key": KEY, "temperature": 0, "max_tokens": TOKENS}
        self.same |= {"extra_body": IGNORE_EOS, "max_retries": 0}

    def chat(self, call: Callable[..., Any], **more: Any) -> Any:
        return call(**{**self.same, "model": "openai/demo", "messages": CHAT, **more})

    async def texts(self) -> object:
        whole = self.chat(self.litellm.completion)
        pieces = list(self.chat(self.litellm.completion, stream=True, stream_options={"include_usage": True}))
        later = [piece async for piece in await self.chat(self.litellm.acompletion, stream=True)]
        contents = [
            [piece.choices[0].delta.content or "" for piece in found if piece.choices] for found in (pieces, later)
        ]
        text = {"model": "text-completion-openai/demo", "prompt": PROMPT}
        completion = self.litellm.text_completion(**self.same, **text)
        stream = await self.litellm.atext_completion(**self.same, **text, stream=True)
        return {
            "chats": [
                whole.choices[0].message.content,
                (await self.chat(self.litellm.acompletion)).choices[0].message.content,
                *map("".join, contents),
            ],
            "pieces": [len([piece for piece in found if piece]) for found in contents],
            "tokens": [whole.usage.completion_tokens, pieces[-1].usage.completion_tokens],
            "reason": whole.choices[0].finish_reason,
            "completions": [
                completion.choices[0].text,
                "".join([piece.choices[0].text or "" async for piece in stream]),
            ],
        }

    async def structures(self) -> object:
        """The same by what OpenAI's library makes of a model of pydantic's."""
        same = {"max_tokens": 300}
        answer = await self.chat(self.litellm.acompletion, response_format=Person, **same)
        parsed = Person.model_validate_json(answer.choices[0].message.content)
        function = {"name": "Person", "description": "A person.", "parameters": Person.model_json_schema()}
        tools = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
        called = (await self.chat(self.litellm.acompletion, **tools, **same)).choices[0]
        pieces = [piece async for piece in await self.chat(self.litellm.acompletion, stream=True, **tools, **same)]
        streamed = self.litellm.stream_chunk_builder(pieces).choices[0]
        calls, later = ([call.function for call in each.message.tool_calls] for each in (called, streamed))
        return {
            "structured": {"response_format": {"parsed": parsed.model_dump(), "kind": "Person", "error": None}},
            "called": [[call.name, json.loads(call.arguments)] for call in calls],
            "streamed": [[call.name, json.loads(call.arguments)] for call in later],
            "reason": called.finish_reason,
        }

    async def one(self, *, retries: int = 0, **more: Any) -> Any:
        answer = await self.chat(self.litellm.acompletion, max_retries=retries, **more)
        return answer.usage.completion_tokens

    async def leave(self) -> None:
        stream = await self.chat(self.litellm.acompletion, stream=True, max_tokens=LONG)
        async for piece in stream:
            if piece.choices[0].delta.content:
                break
        await stream.aclose()


def sum_of(pieces: list[Any]) -> Any:
    total = pieces[0]
    for piece in pieces[1:]:
        total += piece
    return total


async def failure(call: Awaitable[Any]) -> dict[str, Any]:
    """The error that a call fails with, by class, status and the server's words."""
    try:
        await call
    except Exception as error:
        names = [each.__name__ for each in type(error).__mro__]
        return {"kinds": names, "status": getattr(error, "status_code", None), "message": str(error)}
    return {}


async def overload(library: LangChain | LiteLLM) -> object:
    """Thirty at once by a client that does not try again, then twelve by one that does."""
    found = await asyncio.gather(*(failure(library.one()) for _ in range(30)))
    return {"found": found, "served": await asyncio.gather(*(library.one(retries=20) for _ in range(12)))}


async def errors(library: LangChain | LiteLLM) -> object:
    return {
        "too many tokens": await failure(library.one(max_tokens=1_000_000)),
        "a prompt too long for them": await failure(library.one(max_tokens=2047)),
        "unknown model": await failure(
            library.one(model="openai/nobody" if isinstance(library, LiteLLM) else "nobody")
        ),
        "unknown parameter": await failure(library.one(extra_body={"unheard_of": 1})),
        "too late": await failure(library.one(max_tokens=LONG, timeout=1.0)),
    }


async def main(library: str, url: str, what: str) -> None:
    client = {"langchain": LangChain, "litellm": LiteLLM}[library](url)
    do: dict[str, Callable[[], Awaitable[object]]] = {
        "texts": client.texts,
        "structures": client.structures,
        "leave": client.leave,
        "overload": lambda: overload(client),
        "errors": lambda: errors(client),
        "call": lambda: failure(client.one()),
    }
    print(json.dumps(await do[what]()))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
