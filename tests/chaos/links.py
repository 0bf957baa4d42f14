"""Relays between every pair of services of a stack: what its network is made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

from bucketserve.store.embedded import ReservedPorts
from bucketserve_cli.stack import LocalStack
from tests.chaos.proxy import Relay

__all__ = ["KINDS", "Links"]

KINDS = ("gateway to scheduler", "worker to scheduler", "workers to gateway", "workers to worker", "to store")
"""Who connects to whom. Gateways and workers tell all workers one address: those links are shared by their clients."""


class Links:
    """The links by kind and by the service that they belong to."""

    def __init__(self, num_workers: int, num_gateways: int, num_schedulers: int, remote: Collection[int]) -> None:
        """Knows no address yet. The environments are to be those of the stack; connect() fills them.

        The workers of those numbers share no memory with others: their KV goes over the network.
        """
        self._remote = remote
        self.gateway_environ: tuple[dict[str, str], ...] = tuple({} for _ in range(num_gateways))
        self.scheduler_environ: tuple[dict[str, str], ...] = tuple({} for _ in range(num_schedulers))
        self.worker_environ: tuple[dict[str, str], ...] = tuple({} for _ in range(num_workers))
        self.of: dict[str, dict[str, list[Relay]]] = {kind: defaultdict(list) for kind in KINDS}
        """Kind -> name of a service -> its relays."""
        self._ports = ReservedPorts()

    async def connect(self, stack: LocalStack, store_address: str) -> None:
        """Puts relays between the services of a stack that is not started yet."""
        for index, environ in enumerate(self.gateway_environ):
            name = _name("gateway", index)
            environ["BUCKETSERVE_GATEWAY_SCHEDULER_ADDRESS"] = self._all("gateway to scheduler", name, stack)
            delivery = self._relay("workers to gateway", name, stack.delivery_addresses[index])
            environ["BUCKETSERVE_GATEWAY_DELIVERY_ADDRESS"] = delivery.address
            environ["BUCKETSERVE_GATEWAY_REDIS_URL"] = (
                f"redis://{self._relay('to store', name, store_address).address}/0"
            )
        for index, environ in enumerate(self.scheduler_environ):
            relay = self._relay("to store", _name("scheduler", index), store_address)
            environ["BUCKETSERVE_SCHEDULER_REDIS_URL"] = f"redis://{relay.address}/0"
        for index, environ in enumerate(self.worker_environ):
            name = f"worker-{index}"
            environ["BUCKETSERVE_WORKER_SCHEDULER_ADDRESS"] = self._all("worker to scheduler", name, stack)
            environ["BUCKETSERVE_WORKER_LISTEN"] = listen = f"127.0.0.1:{self._ports.take()}"
            if index in self._remote:
                environ["CHAOS_REMOTE"] = "1"
                environ["BUCKETSERVE_WORKER_ADDRESS"] = self._relay("workers to worker", name, listen).address
        for relay in self.relays:
            await relay.start()

    def environ_of(self, name: str) -> dict[str, str]:
        """Returns the environment of the service of that name."""
        kind, _, index = name.partition("-")
        of_kind = {"worker": self.worker_environ, "gateway": self.gateway_environ, "scheduler": self.scheduler_environ}
        return of_kind[kind][int(index or 0)]

    @property
    def relays(self) -> list[Relay]:
        """All of them."""
        return [relay for of_kind in self.of.values() for relays in of_kind.values() for relay in relays]

    @property
    def hops(self) -> dict[str, str]:
        """Whom each end of a relay stands for, as the kernel writes addresses."""
        return {end: beyond for relay in self.relays for end, beyond in relay.hops.items()}

    async def close(self) -> None:
        """Ends all relays."""
        for relay in self.relays:
            await relay.close()
        self._ports.close()

    def _all(self, kind: str, name: str, stack: LocalStack) -> str:
        return ",".join(self._relay(kind, name, address).address for address in stack.scheduler_addresses)

    def _relay(self, kind: str, name: str, target: str) -> Relay:
        relay = Relay(target)
        self.of[kind][name].append(relay)
        return relay


def _name(kind: str, index: int) -> str:
    return f"{kind}-{index}" if index else kind
