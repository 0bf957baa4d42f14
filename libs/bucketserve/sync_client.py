"""The Python client for code without asyncio.

with SyncClient("127.0.0.1:50051") as client:
    for event in client.generate(prompt="And the king said", max_tokens=32):
        if isinstance(event, Chunk):
            print(event.text, end="")
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

import grpc

from bucketserve.client import SERVICE, Attempts, Chunk, Event, Finished, Started, generate_request
from bucketserve.rpc.channel import UNARY_TIMEOUT_S, key_metadata, open_sync_channel
from bucketserve.rpc.status import error_from_call
from bucketserve.rpc.tls import Tls
from bucketserve.v1 import inference_pb2, inference_pb2_grpc

__all__ = ["Chunk", "Event", "Finished", "Started", "SyncClient"]

T = TypeVar("T")


class SyncClient:
    """BucketServeClient with methods that block; several threads may use one.

    What it repeats and what it raises is the same.
    """

    def __init__(
        self,
        address: str,
        *,
        tls: Tls | None = None,
        api_key: str = "",
        options: Sequence[tuple[str, int | str]] = (),
    ) -> None:
        """Connects when first used; arguments as for BucketServeClient."""
        self._metadata = key_metadata(api_key)
        self._channel = open_sync_channel(address, tls, watched_service=SERVICE, options=options)
        self._is_closed = False
        self.stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    def __enter__(self) -> SyncClient:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the channel."""
        self.close()

    def close(self) -> None:
        """Closes the channel; running calls are cancelled."""
        self._is_closed = True
        self._channel.close()

    def generate(
        self, *, timeout_s: float | None = None, metadata: Sequence[tuple[str, str]] = (), **request: Any
    ) -> Iterator[Event]:
        """Yields Started, then Chunks, then Finished; the request as generate_request takes it.

        Leaving the iteration early (its close(), or an exception such as KeyboardInterrupt) cancels the request.

        Raises:
            ValueError: more than one kind of prompt is given, or a value does not fit its field.
            BucketServeError: the one that the server's status names.
            grpc.RpcError: any other failure.
        """
        yield from self.generate_raw(generate_request(**request), timeout_s=timeout_s, metadata=metadata)

    def generate_raw(
        self,
        request: inference_pb2.GenerateRequest,
        *,
        timeout_s: float | None = None,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> Iterator[Event]:
        """Like generate, for a request message."""
        attempts = Attempts(timeout_s)
        while True:
            call: Any = self.stub.Generate(request, timeout=attempts.begin(), metadata=(*self._metadata, *metadata))
            is_heard = False
            try:
                for response in call:
                    is_heard = True
                    yield getattr(response, response.WhichOneof("event"))
                return
            except grpc.RpcError:
                # A failed call is the error that it raises.
                if self._is_closed or (pause_s := attempts.pause_after(call, is_heard=is_heard)) is None:
                    raise _named(call) from None
            finally:
                call.cancel()
            time.sleep(pause_s)

    def generate_text(self, prompt: str, **options: Any) -> str:
        """Returns the whole text; options as for generate."""
        return "".join(event.text for event in self.generate(prompt=prompt, **options) if isinstance(event, Chunk))

    def tokenize(self, prompt: str, model: str = "") -> list[int]:
        """Returns the token ids of a text.

        Raises:
            BucketServeError: the one that the server's status names.
        """
        response = self._answer(self.stub.Tokenize, inference_pb2.TokenizeRequest(model=model, prompt=prompt))
        return list(response.token_ids)

    def list_models(self) -> list[inference_pb2.Model]:
        """Returns the served models, in name order."""
        return list(self._answer(self.stub.ListModels, inference_pb2.ListModelsRequest()).models)

    def _answer(self, method: Any, request: object) -> Any:
        try:
            return method(request, timeout=UNARY_TIMEOUT_S, metadata=self._metadata)
        except grpc.RpcError as error:
            raise _named(error) from None


def _named(error: Any) -> Exception:
    """Returns the error that the server's status names, or else the call's own."""
    return error_from_call(error) or error
