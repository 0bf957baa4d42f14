"""Answers in OpenAI's shapes: of each choice what its run brings, as chunks of a stream or gathered to a whole.

Chunks are dictionaries that become JSON once; nothing else is made for each of them. What is gathered becomes JSON as
it comes: that is what the client gets, and a third of what the same takes as objects.
"""

from __future__ import annotations

import asyncio
import codecs
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from functools import lru_cache
from typing import Any

import orjson

from bucketserve.v1 import common_pb2, inference_pb2
from bucketserve_gateway.admission import Room
from bucketserve_gateway.detokenizer import Detokenizer
from bucketserve_gateway.models import ServedModel
from bucketserve_gateway.openai.bodies import Written, pieces_of
from bucketserve_gateway.openai.structure import CALL
from bucketserve_gateway.openai.translation import Wanted

__all__ = ["Answer", "Choice", "gather", "small"]

REASONS: dict[int, str] = {common_pb2.FINISH_REASON_STOP: "stop", common_pb2.FINISH_REASON_LENGTH: "length"}
LEAST_LOGPROB = -9999.0
"""What OpenAI says where the logarithm is of nothing: JSON has no infinity."""
MAX_LOGPROBS = 128
"""Log-probabilities that are written down at once."""

Json = dict[str, Any]
Events = AsyncIterator[inference_pb2.GenerateResponse]


class Answer:
    """What all choices of an answer have in common."""

    def __init__(self, wanted: Wanted, model: ServedModel, started: Sequence[inference_pb2.GenerateStarted]) -> None:
        """Takes what was asked for, the model that answers, and how each choice began, when it has."""
        self._wanted = wanted
        kind = "chat.completion" if wanted.is_chat else "text_completion"
        is_chat_stream = wanted.is_chat and wanted.is_stream
        self._frame: Json = {
            "id": wanted.answer_id,
            "object": kind + ".chunk" if is_chat_stream else kind,
            "created": int(time.time()),
            "model": model.card.name,
        }
        if wanted.tier is not None:
            is_batch = wanted.prompts[0].request_class == common_pb2.REQUEST_CLASS_BATCH
            self._frame["service_tier"] = "flex" if is_batch else "default"
        shown = [_shown(prompt, model) if wanted.is_echo else "" for prompt in wanted.prompts]
        self.choices = [
            Choice(index, wanted, model, shown[index // wanted.num_each]) for index in range(wanted.num_choices)
        ]
        self._started = started

    def chunk(self, choice: Json) -> Json:
        """Returns a chunk of a stream with a piece of one choice."""
        wanted = self._wanted
        if not wanted.has_usage:
            return {**self._frame, "choices": [choice]}
        return {**self._frame, "choices": [choice], "usage": self.usage() if wanted.has_usage_always else None}

    def last_chunk(self) -> Json:
        """Returns the chunk with what was used."""
        return {**self._frame, "choices": [], "usage": self.usage()}

    def whole(self) -> Json:
        """Returns all of it, when every choice has ended."""
        return {**self._frame, "choices": [choice.whole for choice in self.choices], "usage": self.usage()}

    def usage(self) -> Json:
        """Returns the tokens used so far. A prompt counts once, however many choices it has."""
        each = self._wanted.num_each
        num_prompt = sum(started.prompt_tokens for started in self._started[::each])
        num_output = sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": sum(choice.num_cached for choice in self.choices[::each])},
        }


class Choice:
    """One choice as it comes: the output of one run."""

    def __init__(self, index: int, wanted: Wanted, model: ServedModel, before: str) -> None:
        """Takes its place, and what is shown before its output: the prompt, if that was asked for."""
        self.num_tokens = 0
        self.num_cached = 0
        self.whole = Written([])
        """All of it, when it has been gathered and has ended."""
        self._index = index
        self._is_chat = wanted.is_chat
        self._has_logprobs = wanted.prompts[0].response.HasField("num_logprobs")
        self._before = before
        self._call = None if wanted.call_reason is None else _Call(wanted.call_reason)
        self._tokens = _Tokens(model)
        self._is_first = True
        self._text = bytearray(b'"')
        """What was gathered, as JSON without its end; so are the arrays of log-probabilities."""
        self._logprobs: dict[str, bytearray] = {}
        self._reason: str | None = None
        self._is_cut = False
        """Whether it has ended before it was whole."""

    def piece(self, chunk: inference_pb2.GenerateChunk) -> Json | None:
        """Returns a piece for a stream; None if there is nothing to show yet."""
        text, logprobs = self._take(chunk)
        return self._delta(text, logprobs, None) if text or logprobs is not None else None

    def end(self, finished: inference_pb2.GenerateFinished) -> Json:
        """Returns the last piece for a stream."""
        self._finish(finished)
        return self._delta(self._lead(), None, self._reason)

    @property
    def num_bytes(self) -> int:
        """Bytes that what was gathered takes."""
        return sum(map(sys.getsizeof, (*self.whole.pieces, self._text, *self._logprobs.values())))

    def gather(self, event: inference_pb2.GenerateResponse) -> None:
        """Takes an event of the run for the whole."""
        if event.HasField("finished"):
            self._finish(event.finished)
            self._add(self._lead())
            self.whole = Written(pieces_of(self._shown()))
            self._text, self._logprobs = bytearray(), {}
            return
        text, logprobs = self._take(event.chunk)
        self._add(text)
        for name, values in (logprobs or {}).items():
            if name in self._logprobs:
                self._logprobs[name] += b"," + orjson.dumps(values)[1:-1]
            else:
                self._logprobs[name] = bytearray(orjson.dumps(values)[:-1])

    def _add(self, text: str) -> None:
        self._text += orjson.dumps(text)[1:-1]

    def _shown(self) -> Json:
        """Returns what was gathered, all of it."""
        shown: Json = {"index": self._index}
        text = Written([self._text, b'"'])
        if self._is_chat:
            calls = None
            if self._call is not None:
                calls = self._call.whole(orjson.loads(b"".join(text.pieces)), is_cut=self._is_cut)
            shown["message"] = {"role": "assistant", "content": None if calls else text, "refusal": None}
            if calls:
                shown["message"]["tool_calls"] = calls
        else:
            shown["text"] = text
        logprobs: Json | None = None
        if self._has_logprobs:
            logprobs = {name: Written([values, b"]"]) for name, values in self._logprobs.items()} or self._no_tokens()
        return {**shown, "logprobs": logprobs, "finish_reason": self._reason}

    def _lead(self) -> str:
        """Returns what stands before the output, the first time."""
        lead, self._before = self._before, ""
        return lead

    def _take(self, chunk: inference_pb2.GenerateChunk) -> tuple[str, dict[str, list[Any]] | None]:
        self.num_tokens += len(chunk.token_ids)
        text = self._lead() + chunk.text
        if not self._has_logprobs or not chunk.logprobs:
            return text, None
        write = self._tokens.of_chat if self._is_chat else self._tokens.of_completion
        return text, write(chunk.logprobs)

    def _finish(self, finished: inference_pb2.GenerateFinished) -> None:
        self._reason = REASONS[finished.reason]
        self._is_cut = self._reason != "stop" or bool(finished.matched_stop)
        if self._call is not None and not self._is_cut:
            self._reason = self._call.reason
        self.num_cached = finished.usage.cached_prompt_tokens

    def _delta(self, text: str, logprobs: Json | None, reason: str | None) -> Json:
        shown: Json = {"index": self._index}
        if self._is_chat:
            delta: Json = {}
            shown["delta"] = delta
            if self._is_first:
                delta["role"], self._is_first = "assistant", False
            if self._call is not None:
                if calls := self._call.piece(text, is_cut=self._is_cut):
                    delta["tool_calls"] = calls
            elif text or reason is None:
                delta["content"] = text
        else:
            shown["text"] = text
        shown["logprobs"], shown["finish_reason"] = logprobs, reason
        return shown

    def _no_tokens(self) -> dict[str, list[Any]]:
        write = self._tokens.of_chat if self._is_chat else self._tokens.of_completion
        return write(())


async def gather(choice: Choice, run: Events, room: Room) -> None:
    """Takes the events of a run for the whole of a choice, which counts in a room.

    Raises:
        OverloadedError: there is no room.
        BucketServeError: as the run raises it.
    """
    async for event in small(run):
        before = choice.num_bytes
        choice.gather(event)
        room.grow(choice.num_bytes - before)


async def small(run: Events) -> Events:
    """Yields a run's events, those with many log-probabilities in parts between which others have their turn.

    What waited for a client that does not read may be thousands of them, which take time to write down.
    """
    async for event in run:
        chunk = event.chunk
        most = max(MAX_LOGPROBS // (1 + len(chunk.logprobs[0].top)), 1) if chunk.logprobs else 0
        if len(chunk.logprobs) <= most:
            yield event
            continue
        for start in range(0, len(chunk.logprobs), most):
            part = slice(start, start + most)
            yield inference_pb2.GenerateResponse(
                chunk=inference_pb2.GenerateChunk(
                    text="" if start else chunk.text, token_ids=chunk.token_ids[part], logprobs=chunk.logprobs[part]
                )
            )
            await asyncio.sleep(0)


class _Call:
    """The call of a tool, as its text comes: its beginning names the tool, a brace ends it."""

    def __init__(self, reason: str) -> None:
        """Takes why it ends when it is whole."""
        self.reason = reason
        self._id = f"call_{uuid.uuid4().hex}"
        self._held = ""
        self._is_named = False

    def whole(self, text: str, *, is_cut: bool) -> list[Json]:
        """Returns the calls of a text; none if it ends before the tool is named."""
        beginning = CALL.match(text)
        if beginning is None:
            return []
        arguments = text[beginning.end() :] if is_cut else text[beginning.end() : -1]
        return [{"id": self._id, "type": "function", "function": {"name": beginning[1], "arguments": arguments}}]

    def piece(self, text: str, *, is_cut: bool) -> list[Json]:
        """Returns what further text is for a stream; is_cut: it ends with this, and is not whole."""
        self._held += text
        shown: Json = {"index": 0}
        if not self._is_named:
            if (beginning := CALL.match(self._held)) is None:
                return []
            self._is_named, self._held = True, self._held[beginning.end() :]
            shown.update(id=self._id, type="function", function={"name": beginning[1]})
        # The last character may be the brace that ends it.
        arguments = self._held if is_cut else self._held[:-1]
        self._held = self._held[len(arguments) :]
        if not arguments and "id" not in shown:
            return []
        shown.setdefault("function", {})["arguments"] = arguments
        return [shown]


class _Tokens:
    """What the tokens of one output are as text, in order."""

    def __init__(self, model: ServedModel) -> None:
        """Begins at the first one."""
        self._model = model
        self._previous: int | None = None
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def of_chat(self, positions: Iterable[common_pb2.PositionLogprobs]) -> dict[str, list[Any]]:
        """Returns log-probabilities as chat completions have them."""
        content = []
        for position in positions:
            tops = [self._chat_token(top) for top in position.top]
            content.append({**self._chat_token(position.chosen), "top_logprobs": tops})
            self._previous = position.chosen.token_id
        return {"content": content}

    def of_completion(self, positions: Iterable[common_pb2.PositionLogprobs]) -> dict[str, list[Any]]:
        """Returns log-probabilities as completions have them."""
        shown: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for position in positions:
            chosen = position.chosen
            text, values = self._text(chosen.token_id)
            shown["tokens"].append(text)
            shown["token_logprobs"].append(_finite(chosen.logprob))
            tops: dict[str, float] = {}
            # The chosen one is always among them; of tokens that look alike the likeliest counts.
            for top in (*position.top, chosen):
                tops.setdefault(self._text(top.token_id)[0], _finite(top.logprob))
            shown["top_logprobs"].append(tops)
            shown["text_offset"].append(self._offset)
            self._offset += len(self._utf8.decode(bytes(values or ())))
            self._previous = chosen.token_id
        return shown

    def _chat_token(self, token: common_pb2.TokenLogprob) -> Json:
        text, values = self._text(token.token_id)
        return {"token": text, "logprob": _finite(token.logprob), "bytes": values}

    def _text(self, token_id: int) -> tuple[str, list[int] | None]:
        """Returns a token as a text of its own, and the bytes that it adds; None for one that is never shown."""
        # The first one follows a prompt, which is not known here: any token before it does.
        previous = token_id if self._previous is None else self._previous
        raw = self._model.token_bytes(token_id, previous)
        if raw is None:
            return self._model.tokenizer.convert_ids_to_tokens(token_id) or "", None
        return _written(raw)


@lru_cache(maxsize=1 << 16)
def _written(raw: bytes) -> tuple[str, list[int]]:
    """Returns the bytes of a token as text and as numbers, which nobody may change."""
    try:
        return raw.decode(), list(raw)
    except UnicodeDecodeError:
        # As OpenAI writes a part of a character.
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), list(raw)


def _finite(logprob: float) -> float:
    return logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB


def _shown(request: inference_pb2.GenerateRequest, model: ServedModel) -> str:
    """Returns a prompt as text. What ids leave incomplete at their end belongs to the output."""
    if request.HasField("prompt"):
        return request.prompt
    return Detokenizer(model.token_bytes).put(request.token_ids.ids)
