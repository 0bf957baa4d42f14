"""Every Redis key, its type and its units.

All keys of a model share a hash tag, {deployment/model}, so that they live in one Cluster slot and one script may touch
them all.

| key                        | type   | content                                                               |
|----------------------------|--------|-----------------------------------------------------------------------|
| bs:{d/model}:leader        | string | owner of the leadership; expires after its lease (milliseconds)       |
| bs:{d/model}:epoch         | hash   | epoch: fencing epoch, only grows; owner: who got it                   |
| bs:{d/model}:waiting       | zset   | run id -> prefill length in tokens                                    |
| bs:{d/model}:ticket        | hash   | run id -> the serialised ticket, without the prompt                   |
| bs:{d/model}:place         | hash   | run id -> worker id, a newline, batch id; only of those at a worker   |
| bs:{d/model}:edges         | string | bucket edges in tokens, comma-separated                               |
| bs:{d/model}:outputs       | hash   | class and prompt lengths -> requests by output length, comma-separated |
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote

__all__ = ["Keys"]


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one model of one deployment."""

    deployment: str
    model: str

    @property
    def _prefix(self) -> str:
        # Braces in a name would move the hash tag; quote() leaves none.
        return f"bs:{{{self.deployment}/{quote(self.model, safe='')}}}:"

    @property
    def leader(self) -> str:
        """Who leads."""
        return f"{self._prefix}leader"

    @property
    def epoch(self) -> str:
        """Fencing epoch."""
        return f"{self._prefix}epoch"

    @property
    def waiting(self) -> str:
        """Waiting tickets by prefill length."""
        return f"{self._prefix}waiting"

    @property
    def ticket(self) -> str:
        """All tickets."""
        return f"{self._prefix}ticket"

    @property
    def place(self) -> str:
        """Which worker has what."""
        return f"{self._prefix}place"

    @property
    def edges(self) -> str:
        """Bucket edges."""
        return f"{self._prefix}edges"

    @property
    def outputs(self) -> str:
        """How long outputs were."""
        return f"{self._prefix}outputs"
