"""A Python client for InferenceService, for asyncio.

async with BucketServeClient("127.0.0.1:50051") as client:
    async for event in client.generate(prompt="And the king said", max_tokens=32):
        if isinstance(event, Chunk):
            print(event.text, end="")
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from types import TracebackType

import grpc

from bucketserve.rpc.channel import UNARY_TIMEOUT_S, key_metadata, open_channel
from bucketserve.rpc.listening import messages_of
from bucketserve.rpc.status import FailedCall, error_from_call, errors_named, is_answered
from bucketserve.rpc.tls import Tls
from bucketserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc

__all__ = ["SERVICE", "Attempts", "BucketServeClient", "Chunk", "Event", "Finished", "Started", "generate_request"]

Started = inference_pb2.GenerateStarted
Chunk = inference_pb2.GenerateChunk
Finished = inference_pb2.GenerateFinished
Event = Started | Chunk | Finished

SERVICE = "bucketserve.v1.InferenceService"
RECONNECT_S = 5.0
"""As long as it takes to find a gateway again whose restart was not noticed yet."""
LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
"""What gRPC itself says of a call whose connection failed, and of one that crossed the closing of its gateway."""
_FIRST_PAUSE_S, _MOST_PAUSE_S = 0.2, 0.5


class BucketServeClient:
    """One channel to a gateway, or to several behind one name (dns:///name:port, round robin).

    A request is sent again only if nothing was heard of it and no server gave the error: the connection failed, or the
    gateway was closing, so that it never arrived or its run was cancelled with the call. What a server answers is never
    repeated, be it UNAVAILABLE or RESOURCE_EXHAUSTED: what to do with the error's retry_delay_s is the caller's
    decision.
    """

    def __init__(
        self,
        address: str,
        *,
        tls: Tls | None = None,
        api_key: str = "",
        options: Sequence[tuple[str, int | str]] = (),
    ) -> None:
        """Connects when first used.

        Args:
            address: host:port, or a name with a scheme of gRPC's.
            tls: whom to trust, such as Tls(ca_file="ca.pem"), and who we are if the gateway asks; None: plain text.
            api_key: shown with every call, to be kept from whoever can listen by tls; empty: none.
            options: further channel arguments.
        """
        self._metadata = key_metadata(api_key)
        self._channel = open_channel(address, tls, watched_service=SERVICE, options=options)
        self.stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    async def __aenter__(self) -> BucketServeClient:
        """Returns itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the channel."""
        await self.close()

    async def close(self) -> None:
        """Closes the channel; running calls are cancelled."""
        await self._channel.close()

    async def generate(
        self,
        *,
        prompt: str | None = None,
        token_ids: Sequence[int] | None = None,
        chat: Sequence[tuple[str, str]] | None = None,
        model: str = "",
        request_id: str = "",
        max_tokens: int | None = None,
        sampling: common_pb2.SamplingParams | None = None,
        stop_strings: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        num_logprobs: int | None = None,
        structured_output: common_pb2.StructuredOutput | None = None,
        is_batch: bool = False,
        tenant: str = "",
        slo: common_pb2.Slo | None = None,
        timeout_s: float | None = None,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> AsyncIterator[Event]:
        """Yields Started, then Chunks, then Finished. Exactly one of prompt, token_ids and chat is given.

        chat is a sequence of (role, content). Leaving the iteration early cancels the request.

        Raises:
            ValueError: more than one kind of prompt is given, or a value does not fit its field.
            BucketServeError: the one that the server's status names.
            grpc.aio.AioRpcError: any other failure.
        """
        request = generate_request(
            prompt=prompt,
            token_ids=token_ids,
            chat=chat,
            model=model,
            request_id=request_id,
            max_tokens=max_tokens,
            sampling=sampling,
            stop_strings=stop_strings,
            stop_token_ids=stop_token_ids,
            ignore_eos=ignore_eos,
            num_logprobs=num_logprobs,
            structured_output=structured_output,
            is_batch=is_batch,
            tenant=tenant,
            slo=slo,
        )
        async for event in self.generate_raw(request, timeout_s=timeout_s, metadata=metadata):
            yield event

    async def generate_raw(
        self,
        request: inference_pb2.GenerateRequest,
        *,
        timeout_s: float | None = None,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> AsyncIterator[Event]:
        """Like generate, for a request message."""
        attempts = Attempts(timeout_s)
        while True:
            call = self.stub.Generate(request, timeout=attempts.begin(), metadata=(*self._metadata, *metadata))
            is_heard = False
            try:
                async for response in messages_of(call):
                    is_heard = True
                    yield getattr(response, response.WhichOneof("event"))
                return
            except grpc.aio.AioRpcError as error:
                if (pause_s := attempts.pause_after(error, is_heard=is_heard)) is None:
                    raise error_from_call(error) or error from None
            finally:
                call.cancel()
            await asyncio.sleep(pause_s)

    async def generate_text(self, prompt: str, **options: object) -> str:
        """Returns the whole text; options as for generate."""
        pieces = [event.text async for event in self.generate(prompt=prompt, **options) if isinstance(event, Chunk)]  # type: ignore[arg-type]
        return "".join(pieces)

    async def tokenize(self, prompt: str, model: str = "") -> list[int]:
        """Returns the token ids of a text.

        Raises:
            BucketServeError: the one that the server's status names.
        """
        request = inference_pb2.TokenizeRequest(model=model, prompt=prompt)
        response = await errors_named(self.stub.Tokenize(request, timeout=UNARY_TIMEOUT_S, metadata=self._metadata))
        return list(response.token_ids)

    async def list_models(self) -> list[inference_pb2.Model]:
        """Returns the served models, in name order."""
        request = inference_pb2.ListModelsRequest()
        response = await errors_named(self.stub.ListModels(request, timeout=UNARY_TIMEOUT_S, metadata=self._metadata))
        return list(response.models)


class Attempts:
    """How often a request is sent, and when: what a client does if its connection fails."""

    def __init__(self, timeout_s: float | None) -> None:
        """Begins now."""
        self._timeout_s = timeout_s
        self._started_s = time.monotonic()
        self._passed_s = 0.0
        self._pause_s = _FIRST_PAUSE_S

    def begin(self) -> float | None:
        """Returns what the attempt that begins now has of the timeout."""
        self._passed_s = time.monotonic() - self._started_s
        return None if self._timeout_s is None else self._timeout_s - self._passed_s

    def pause_after(self, error: FailedCall, *, is_heard: bool) -> float | None:
        """Returns how long to wait before the next attempt, in seconds; None if there is none."""
        is_lost = error.code() in LOST and not is_answered(error)
        most_s = min(RECONNECT_S, self._timeout_s or RECONNECT_S)
        if is_heard or not is_lost or self._passed_s + self._pause_s > most_s:
            return None
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, _MOST_PAUSE_S)
        return pause_s


def generate_request(
    *,
    prompt: str | None = None,
    token_ids: Sequence[int] | None = None,
    chat: Sequence[tuple[str, str]] | None = None,
    model: str = "",
    request_id: str = "",
    max_tokens: int | None = None,
    sampling: common_pb2.SamplingParams | None = None,
    stop_strings: str | Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    num_logprobs: int | None = None,
    structured_output: common_pb2.StructuredOutput | None = None,
    is_batch: bool = False,
    tenant: str = "",
    slo: common_pb2.Slo | None = None,
) -> inference_pb2.GenerateRequest:
    """Returns a request; exactly one of prompt, token_ids and chat, a sequence of (role, content), is given.

    Raises:
        ValueError: more than one kind of prompt is given, or a value does not fit its field.
    """
    if sum(given is not None for given in (prompt, token_ids, chat)) > 1:
        raise ValueError("give one of prompt, token_ids and chat")
    return inference_pb2.GenerateRequest(
        request_id=request_id,
        model=model,
        prompt=prompt,
        token_ids=None if token_ids is None else inference_pb2.TokenIds(ids=token_ids),
        chat=None if chat is None else _chat(chat),
        sampling=sampling,
        stopping=common_pb2.StoppingParams(
            max_tokens=max_tokens,
            stop_strings=[stop_strings] if isinstance(stop_strings, str) else stop_strings,
            stop_token_ids=stop_token_ids,
            ignore_eos=ignore_eos,
        ),
        response=inference_pb2.ResponseOptions(num_logprobs=num_logprobs),
        structured_output=structured_output,
        request_class=common_pb2.REQUEST_CLASS_BATCH if is_batch else common_pb2.REQUEST_CLASS_INTERACTIVE,
        tenant=tenant,
        slo=slo,
    )


def _chat(turns: Sequence[tuple[str, str]]) -> inference_pb2.Chat:
    return inference_pb2.Chat(
        messages=[inference_pb2.ChatMessage(role=role, content=content) for role, content in turns]
    )
