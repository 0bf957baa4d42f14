"""Channels with the options that long-lived streams need."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import grpc

from bucketserve.addresses import channel_target
from bucketserve.rpc.tls import Tls

__all__ = [
    "CHANNEL_OPTIONS",
    "MAX_MESSAGE_BYTES",
    "SERVER_OPTIONS",
    "UNARY_TIMEOUT_S",
    "key_metadata",
    "open_channel",
    "open_sync_channel",
]

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""A batch assignment carries the prompts of its requests; the public limit is the gateway's max_prompt_bytes."""

MAX_PENDING_CALLS = 16_384
"""Calls that a server has not yet looked at, some 10 KiB each."""
UNARY_TIMEOUT_S = 30.0
"""For calls of clients that are answered at once: a server that is there and hangs is noticed."""

_KEEPALIVE = [
    # Half-open connections (a peer that was stopped or cut off) are noticed within 30 s, also while a stream is idle.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
]

CHANNEL_OPTIONS: Sequence[tuple[str, int | str]] = [
    *_KEEPALIVE,
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Reconnecting after a peer's restart should not wait for the default two minutes of backoff.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # How long an attempt to connect may take: less than a few round trips would never succeed on a slow way.
    ("grpc.min_reconnect_backoff_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]

SERVER_OPTIONS: Sequence[tuple[str, int | str]] = [
    *_KEEPALIVE,
    # Without this, clients that ping while idle are cut with GOAWAY too_many_pings.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Who connects and says nothing, or has no call for a while, gives its place to others.
    ("grpc.server_handshake_timeout_ms", 5_000),
    ("grpc.max_connection_idle_ms", 30_000),
    # Beyond these the core ends calls with a bare CANCELLED: a burst waits its turn to be answered by us.
    ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
    ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
    # A second process must not silently share the port.
    ("grpc.so_reuseport", 0),
]


def key_metadata(api_key: str) -> tuple[tuple[str, str], ...]:
    """Returns what a client's call carries to show its key; nothing without one."""
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()


def open_channel(
    address: str,
    tls: Tls | None = None,
    *,
    watched_service: str = "",
    method_configs: Sequence[Mapping[str, object]] = (),
    options: Sequence[tuple[str, int | str]] = (),
) -> grpc.aio.Channel:
    """Returns a channel with round robin, keepalive and message limits for long streams.

    Args:
        address: host:port, or a name with a scheme of gRPC's, such as dns:///host:port.
        tls: how it is secured; None: it isn't.
        watched_service: full name of a service whose health decides where calls go, so that a server that shuts down
            is left before it closes; empty: whoever accepts connections is called.
        method_configs: methodConfig of gRPC's service config, such as a retry policy.
        options: further channel arguments.

    Raises:
        AddressError: the address is neither.
    """
    target, ours = channel_target(address), _options(tls, watched_service, method_configs)
    if tls is None:
        return grpc.aio.insecure_channel(target, options=[*ours, *options])
    return grpc.aio.secure_channel(target, tls.channel_credentials(), options=[*ours, *options])


def open_sync_channel(
    address: str,
    tls: Tls | None = None,
    *,
    watched_service: str = "",
    options: Sequence[tuple[str, int | str]] = (),
) -> grpc.Channel:
    """Returns the same for code without asyncio."""
    target, ours = channel_target(address), _options(tls, watched_service, ())
    if tls is None:
        return grpc.insecure_channel(target, options=[*ours, *options])
    return grpc.secure_channel(target, tls.channel_credentials(), options=[*ours, *options])


def _options(
    tls: Tls | None, watched_service: str, method_configs: Sequence[Mapping[str, object]]
) -> list[tuple[str, int | str]]:
    config: dict[str, object] = {"loadBalancingConfig": [{"round_robin": {}}], "methodConfig": list(method_configs)}
    if watched_service:
        config["healthCheckConfig"] = {"serviceName": watched_service}
    return [*CHANNEL_OPTIONS, ("grpc.service_config", json.dumps(config)), *(tls.channel_options if tls else ())]
