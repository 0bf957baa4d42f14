"""Who calls, and what they may do: the identity that a key stands for, and the interceptor that asks for keys.

Whatever a client sends is looked at here, message by message, before a servicer sees it; afterwards its tenant is
the key's, and servicers need not know that there are keys.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
from google.protobuf.message import Message

from bucketserve.core.errors import ForbiddenError, SettingsError, UnauthenticatedError
from bucketserve.core.types import RequestClass
from bucketserve.rpc.convert import request_class_from_pb
from bucketserve.v1 import inference_pb2, job_pb2
from bucketserve_gateway.adapters import split_adapter
from bucketserve_gateway.admission import HEALTH
from bucketserve_gateway.keys import EVERYBODY, Grant, Limits, Scope, hash_of, read_keys_file
from bucketserve_gateway.names import ModelNames, may_hear

if TYPE_CHECKING:
    from bucketserve_gateway.tokens import Tokens

__all__ = ["AuthInterceptor", "Identity", "Keys"]

MAX_KEY_CHARACTERS = 256
REFLECTION = "grpc.reflection."
FACADES = ("inference.", "vllm.grpc.engine.")
"""Packages of the other protocols at this port."""

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


@dataclass(frozen=True, slots=True)
class Identity:
    """Who calls, as his key says."""

    tenant: str
    scopes: frozenset[Scope]
    models: frozenset[str] | None
    """By their own names; None: all."""
    classes: frozenset[RequestClass]
    names: ModelNames
    on_refused: Callable[[str], None] = field(repr=False, compare=False)
    """Called with the reason of each refusal."""

    def permit(self, message: Message) -> None:
        """Lets a client's message pass, and puts the key's tenant into it.

        Raises:
            ForbiddenError: the key is not for that.
        """
        match message:
            case inference_pb2.GenerateRequest():
                self._check_scope(Scope.GENERATE)
                self._check_model(message.model)
                self._check_class(request_class_from_pb(message.request_class))
                self._own(message)
            case inference_pb2.TokenizeRequest():
                self._check_scope(Scope.GENERATE)
                self._check_model(message.model)
            case inference_pb2.GetModelRequest():
                self._check_model(message.name)
            case job_pb2.SubmitJobRequest():
                self._check_scope(Scope.JOBS)
                self._check_class(RequestClass.BATCH)
                match message.WhichOneof("message"):
                    case "header":
                        self._own(message.header)
                    case "request":
                        self._check_model(message.request.model)
                        self._own(message.request)
            case job_pb2.GetJobRequest() | job_pb2.FetchJobResultsRequest() | job_pb2.CancelJobRequest():
                self._check_scope(Scope.JOBS)
                self._own(message)
            case inference_pb2.ListModelsRequest():
                # The answer has what the key may use.
                pass
            case _ if message.DESCRIPTOR.full_name.startswith((REFLECTION, *FACADES)):
                # What is asked for in another protocol is permitted when it is translated (public.py).
                pass
            case _:
                raise self._refusal(f"no key is for {message.DESCRIPTOR.full_name}")

    def may_use(self, model: str) -> bool:
        """Whether the key is for a model or an adapter, by any of its names, or for all of a model by "model:*"."""
        name = self.names.resolve(model)
        if self.models is None or name in self.models:
            return True
        base, _ = split_adapter(name)
        return bool(base) and f"{base}:*" in self.models

    def shown(self, message: Message) -> Message:
        """Returns an answer without the models that the key is not for."""
        if not isinstance(message, inference_pb2.ListModelsResponse) or self.models is None:
            return message
        return inference_pb2.ListModelsResponse(models=[model for model in message.models if self.may_use(model.name)])

    def _check_scope(self, scope: Scope) -> None:
        if scope not in self.scopes:
            raise self._refusal(f"this key has no scope {scope.value!r}")

    def _check_model(self, name: str) -> None:
        if not self.may_use(name):
            raise self._refusal(f"this key is not for model {name!r}")

    def _check_class(self, request_class: RequestClass) -> None:
        if request_class not in self.classes:
            raise self._refusal(f"this key is not for requests of class {request_class.value}")

    def _own(self, message: Any) -> None:
        message.tenant = message.tenant or self.tenant
        if message.tenant != self.tenant and Scope.ADMIN not in self.scopes:
            raise self._refusal(f"this key is of another tenant than {message.tenant!r}")

    def _refusal(self, text: str) -> ForbiddenError:
        self.on_refused(ForbiddenError.reason)
        return ForbiddenError(text)


class Keys:
    """The keys of a file, which is read again when it has changed, and tokens.

    Without a file and tokens everybody may do everything.
    """

    def __init__(
        self,
        file: str,
        *,
        tokens: Tokens | None = None,
        names: ModelNames | None = None,
        on_refused: Callable[[str], None] = lambda reason: None,
        on_problem: Callable[[str], None] = lambda problem: None,
    ) -> None:
        """Reads the file.

        Args:
            file: TOML with tables [[keys]] and [[tenants]]; empty: there are no keys.
            tokens: those of an identity provider, which are as good as keys; None: there is none.
            names: what names of models mean, in requests and in keys; None: only themselves.
            on_refused: called with the reason of each refusal.
            on_problem: called with what is wrong with a changed file; the keys that were read last stay in force.

        Raises:
            SettingsError: the file can't be used.
        """
        self._path = Path(file) if file else None
        self._tokens = tokens
        self._names = names or ModelNames(())
        self._on_refused = on_refused
        # Whose tenant is "" names his own, as ADMIN may.
        self._anybody = Identity("", frozenset(Scope), None, frozenset(RequestClass), self._names, on_refused)
        self._on_problem = on_problem
        self._stamp = self._read_stamp()
        self._identities, self._limits = self._read()

    @property
    def has_limits(self) -> bool:
        """Whether any tenant's use is limited."""
        return bool(self._limits)

    def limits_of(self, tenant: str) -> Limits | None:
        """Returns what a tenant may use; None: as much as there is."""
        self._read_if_changed()
        return self._limits.get(tenant) or self._limits.get(EVERYBODY)

    @property
    def is_open(self) -> bool:
        """Whether no key is needed."""
        return self._path is None and self._tokens is None

    async def run(self) -> None:
        """Keeps the keys of tokens up to date; ends when there is nothing to do."""
        if self._tokens is not None:
            await self._tokens.run()

    def identify(self, headers: Mapping[str, str]) -> Identity:
        """Returns who calls, by the header or metadata "authorization: Bearer KEY"; names are in small letters.

        Raises:
            UnauthenticatedError: there is no key, or one that is not known.
        """
        if self.is_open:
            return self._anybody
        self._read_if_changed()
        scheme, _, key = headers.get("authorization", "").partition(" ")
        try:
            if scheme.lower() != "bearer" or not key.strip():
                raise UnauthenticatedError("a key is needed: authorization: Bearer KEY")
            return self._bearer(key.strip())
        except UnauthenticatedError as error:
            self._on_refused(error.reason)
            raise

    def _bearer(self, key: str) -> Identity:
        # No key of ours has a dot.
        if self._tokens is not None and "." in key:
            return self._identity(self._tokens.grant_of(key))
        identity = self._identities.get(hash_of(key)) if len(key) <= MAX_KEY_CHARACTERS else None
        if identity is None:
            raise UnauthenticatedError("this key is not known here")
        return identity

    def _identity(self, grant: Grant) -> Identity:
        return Identity(
            grant.tenant,
            frozenset(grant.scopes),
            None if grant.models is None else frozenset(self._names.resolve(name) for name in grant.models if name),
            frozenset(RequestClass if grant.classes is None else grant.classes),
            self._names,
            self._on_refused,
        )

    def _read_if_changed(self) -> None:
        stamp = self._read_stamp()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._identities, self._limits = self._read()
        except SettingsError as error:
            self._on_problem("; ".join(error.problems))

    def _read_stamp(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat() if self._path else None
        except OSError:
            return None
        return found and (found.st_mtime_ns, found.st_size, found.st_ino)

    def _read(self) -> tuple[dict[str, Identity], dict[str, Limits]]:
        """Returns identities by hash, and limits by tenant.

        Raises:
            SettingsError: with everything that is wrong.
        """
        if self._path is None:
            return {}, {}
        found = read_keys_file(self._path)
        identities = {key.sha256: self._identity(key) for key in found.keys}
        return identities, {limits.name: limits for limits in found.tenants}


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Asks each call for its key before anything of it is read, and permits each message when it is.

    Health checks need none: load balancers ask before there is a caller. Whoever has a call when his key is taken away
    keeps it to its end.
    """

    def __init__(self, keys: Keys) -> None:
        """Takes the keys."""
        self._keys = keys

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Makes each handler one that takes what its caller may send, and shows what he may see.

        Raises:
            UnauthenticatedError: there is no key, or one that is not known.
        """
        if self._keys.is_open or str(handler_call_details.method).startswith(HEALTH):
            return await continuation(handler_call_details)
        metadata = handler_call_details.invocation_metadata or ()
        identity = self._keys.identify({key: value for key, value in metadata if isinstance(value, str)})
        may_hear.set(identity.may_use)
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        read: Any = handler.request_deserializer
        write: Any = handler.response_serializer

        def permitted(data: bytes) -> Any:
            message = read(data)
            identity.permit(message)
            return message

        def shown(message: Any) -> Any:
            return write(identity.shown(message))

        inner: Any
        # Admission has made every handler one that takes a stream.
        if handler.response_streaming:
            inner = handler.stream_stream
            return grpc.stream_stream_rpc_method_handler(inner, permitted, shown)
        inner = handler.stream_unary
        return grpc.stream_unary_rpc_method_handler(inner, permitted, shown)
