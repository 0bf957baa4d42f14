"""Ports of services that are started as processes belong to one stack, however many look for ports at once."""

from __future__ import annotations

import random
import socket

import pytest

from bucketserve.store import embedded
from bucketserve.store.embedded import EmbeddedServer, ReservedPorts, free_port


def test_a_port_in_hand_is_given_to_nobody_else_and_a_server_can_listen_there(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = random.randrange(20_000, 30_000)
    monkeypatch.setattr(embedded, "PORTS", (begin, begin + 40))
    ours, others = ReservedPorts(), ReservedPorts()
    try:
        mine = {ours.take() for _ in range(15)}
        theirs = {others.take() for _ in range(10)} | {free_port() for _ in range(10)}
        assert len(mine) == 15
        assert len(theirs) == 20
        assert not mine & theirs
        port = mine.pop()
        for _ in range(2):
            # Nobody listens before, between and after.
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port))
            with EmbeddedServer(port) as server:
                assert server.port == port
    finally:
        ours.close()
        others.close()
