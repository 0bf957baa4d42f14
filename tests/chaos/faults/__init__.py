"""A seeded schedule of faults against a live stack. Each one is undone after a while; two may overlap."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable

from tests.chaos.faults import clocks, engines, network, processes, storage
from tests.chaos.faults.site import Fault, Interval, NotNowError, Site

__all__ = ["MENU", "Faults", "Interval", "Site"]

MENU: tuple[Fault, ...] = (
    *processes.FAULTS,
    *storage.FAULTS,
    *network.FAULTS,
    *clocks.FAULTS,
    *engines.FAULTS,
)
AT_ONCE = 2
QUIET_S = 2.0
"""Without any fault, in a wait that faults explain: to notice that one is over, on a busy machine."""


class Faults:
    """Injects what is on a menu, and keeps a record."""

    def __init__(self, site: Site, seed: int, wanted: Callable[[Fault], bool] = lambda fault: True) -> None:
        """Does nothing yet; wanted says what is on the menu."""
        self._site = site
        self._seed = seed
        self._menu = [fault for fault in MENU if wanted(fault)]
        self.intervals: list[Interval] = []
        """Each fault that was injected."""

    @property
    def injected(self) -> Counter[str]:
        """How often each was."""
        return Counter(interval.fault for interval in self.intervals)

    def was_killed(self, gateway_address: str, from_s: float, to_s: float) -> bool:
        """Whether the gateway at that address ended between two monotonic times."""
        index = self._site.stack.gateway_addresses.index(gateway_address)
        name = f"gateway-{index}" if index else "gateway"
        return any(killed == name and from_s - 1.0 <= at_s <= to_s + 1.0 for killed, at_s in self._site.kills)

    def excuses(self, from_s: float, to_s: float) -> bool:
        """Whether faults explain that a request waited between two monotonic times.

        One that lasted as long does, together with the leases and limits that it implies; so do several that followed
        upon each other, if between them there were hardly moments without any.
        """
        spans = [(fault.began_s, fault.ended_s + fault.aftermath_s) for fault in self.intervals]
        spans = sorted((max(began_s, from_s), min(ended_s, to_s)) for began_s, ended_s in spans)
        quiet_s, covered_s = 0.0, from_s
        for began_s, ended_s in spans:
            if ended_s > began_s:
                quiet_s += max(began_s - covered_s, 0.0)
                covered_s = max(covered_s, ended_s)
        return quiet_s + to_s - covered_s <= QUIET_S

    async def run(self, until_s: float) -> None:
        """Injects faults until that monotonic time; returns when all of them are undone.

        Which come, and in what order, follows from the seed: from a pile of cards, shuffled anew when it is through.
        """
        rng = random.Random(self._seed)
        pile: list[Fault] = []
        running: set[asyncio.Task[None]] = set()
        number = 0
        async with asyncio.TaskGroup() as tasks:
            while (now_s := time.monotonic()) < until_s:
                await asyncio.sleep(min(rng.uniform(0.5, 4.0), until_s - now_s))
                while len(running) >= AT_ONCE:
                    await asyncio.sleep(0.1)
                if not pile:
                    pile = [fault for fault in self._menu for _ in range(fault.weight)]
                    rng.shuffle(pile)
                number += 1
                task = tasks.create_task(self._inject(pile.pop(), random.Random(f"{self._seed}/{number}")))
                running.add(task)
                task.add_done_callback(running.discard)

    async def _inject(self, fault: Fault, rng: random.Random) -> None:
        interval = Interval(fault.name, time.monotonic(), fault.aftermath_s)
        self.intervals.append(interval)
        try:
            interval.at = await fault.inject(self._site, rng)
        except NotNowError:
            self.intervals.remove(interval)
        interval.ended_s = time.monotonic()
