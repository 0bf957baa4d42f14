"""A Python client for InferenceService, for asyncio.

async with BucketServeClient("127.0.0.1:50051") as client:
    async for event in client.generate(prompt="And the king said", max_tokens=32):
        if isinstance(event, Chunk):
            print(event.text, end="")
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from types import TracebackType

import grpc

from bucketserve.rpc.channel import open_channel
from bucketserve.rpc.status import error_from_call
from bucketserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc

__all__ = ["BucketServeClient", "Chunk", "Event", "Finished", "Started"]

Started = inference_pb2.GenerateStarted
Chunk = inference_pb2.GenerateChunk
Finished = inference_pb2.GenerateFinished
Event = Started | Chunk | Finished

_SERVICE = "bucketserve.v1.InferenceService"
# Only what never reached a server is retried, and only before the first message.
_RETRIES = {
    "name": [{"service": _SERVICE}],
    "retryPolicy": {
        # Some three seconds: as long as it takes to find a gateway again whose restart was not noticed yet.
        "maxAttempts": 5,
        "initialBackoff": "0.2s",
        "maxBackoff": "2s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    },
}


class BucketServeClient:
    """One channel to a gateway, or to several behind one name (dns:///name:port, round robin)."""

    def __init__(self, address: str, *, options: Sequence[tuple[str, int | str]] = ()) -> None:
        """Connects when first used; options are further channel arguments."""
        self._channel = open_channel(address, watched_service=_SERVICE, method_configs=[_RETRIES], options=options)
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
        stop_strings: Sequence[str] = (),
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
            BucketServeError: the one that the server's status names.
            grpc.aio.AioRpcError: any other failure.
        """
        request = inference_pb2.GenerateRequest(
            request_id=request_id,
            model=model,
            prompt=prompt,
            token_ids=None if token_ids is None else inference_pb2.TokenIds(ids=token_ids),
            chat=None if chat is None else _chat(chat),
            sampling=sampling,
            stopping=common_pb2.StoppingParams(
                max_tokens=max_tokens,
                stop_strings=stop_strings,
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
        call = self.stub.Generate(request, timeout=timeout_s, metadata=tuple(metadata))
        try:
            async for response in call:
                yield getattr(response, response.WhichOneof("event"))
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error) or error from None
        finally:
            call.cancel()

    async def generate_text(self, prompt: str, **options: object) -> str:
        """Returns the whole text; options as for generate."""
        pieces = [event.text async for event in self.generate(prompt=prompt, **options) if isinstance(event, Chunk)]  # type: ignore[arg-type]
        return "".join(pieces)

    async def tokenize(self, prompt: str, model: str = "") -> list[int]:
        """Returns the token ids of a text.

        Raises:
            BucketServeError: the one that the server's status names.
        """
        try:
            response = await self.stub.Tokenize(inference_pb2.TokenizeRequest(model=model, prompt=prompt))
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error) or error from None
        return list(response.token_ids)

    async def list_models(self) -> list[inference_pb2.Model]:
        """Returns the served models, in name order."""
        try:
            response = await self.stub.ListModels(inference_pb2.ListModelsRequest())
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error) or error from None
        return list(response.models)


def _chat(turns: Sequence[tuple[str, str]]) -> inference_pb2.Chat:
    return inference_pb2.Chat(
        messages=[inference_pb2.ChatMessage(role=role, content=content) for role, content in turns]
    )
