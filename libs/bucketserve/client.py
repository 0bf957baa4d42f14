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
from bucketserve.rpc.status import error_from_call, errors_named, is_answered
from bucketserve.rpc.tls import Tls
from bucketserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc

__all__ = ["BucketServeClient", "Chunk", "Event", "Finished", "Started"]

Started = inference_pb2.GenerateStarted
Chunk = inference_pb2.GenerateChunk
Finished = inference_pb2.GenerateFinished
Event = Started | Chunk | Finished

_SERVICE = "bucketserve.v1.InferenceService"
RECONNECT_S = 5.0
"""As long as it takes to find a gateway again whose restart was not noticed yet."""
_FIRST_PAUSE_S, _MOST_PAUSE_S = 0.2, 0.5


class BucketServeClient:
    """One channel to a gateway, or to several behind one name (dns:///name:port, round robin).

    A request is sent again only if nothing was heard of it and no server gave the error: the connection failed, so that
    it never arrived or its run was cancelled with the connection. What a server answers is never repeated, be it
    UNAVAILABLE or RESOURCE_EXHAUSTED: what to do with the error's retry_delay_s is the caller's decision.
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
        self._channel = open_channel(address, tls, watched_service=_SERVICE, options=options)
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
        if sum(given is not None for given in (prompt, token_ids, chat)) > 1:
            raise ValueError("give one of prompt, token_ids and chat")
        request = inference_pb2.GenerateRequest(
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
            request_class=common_pb2.REQUEST_CLASS_BATCH if is_batch else common_pb2.REQUEST_CLASS_INTERACTIVE,
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
        started_s, pause_s = time.monotonic(), _FIRST_PAUSE_S
        while True:
            passed_s = time.monotonic() - started_s
            remaining_s = None if timeout_s is None else timeout_s - passed_s
            call = self.stub.Generate(request, timeout=remaining_s, metadata=(*self._metadata, *metadata))
            is_heard = False
            try:
                async for response in call:
                    is_heard = True
                    yield getattr(response, response.WhichOneof("event"))
                return
            except grpc.aio.AioRpcError as error:
                is_lost = error.code() is grpc.StatusCode.UNAVAILABLE and not is_answered(error)
                if is_heard or not is_lost or passed_s + pause_s > min(RECONNECT_S, timeout_s or RECONNECT_S):
                    raise error_from_call(error) or error from None
            finally:
                call.cancel()
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _MOST_PAUSE_S)

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


def _chat(turns: Sequence[tuple[str, str]]) -> inference_pb2.Chat:
    return inference_pb2.Chat(
        messages=[inference_pb2.ChatMessage(role=role, content=content) for role, content in turns]
    )
