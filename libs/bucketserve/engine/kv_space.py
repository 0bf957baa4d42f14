"""Who has which pages of the KV memory: the sequences, and those kept for prompts that begin like one before.

A full page may be found by others: it is known by the page before it and its own tokens, which are compared, not only
their hashes, since a collision must never serve somebody else's KV. Who finds it has it in the own table, without a
copy. Nobody writes to a full page, so that nothing ever has to be copied before it is written to either. A page that no
sequence has any more stays until it is wanted; the one used longest ago goes first, and of one sequence its last.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import TypeAlias

from bucketserve.core.errors import EngineError
from bucketserve.engine.kv_memory import PAGE_TOKENS, KvMemory, num_pages

__all__ = ["KvSpace", "KvTable"]


_Key: TypeAlias = "tuple[_Block | bytes, tuple[int, ...]]"
"""What a full page is found by: the block before it, or the salt of its prompt, and its own tokens."""


@dataclass(eq=False, slots=True)
class _Block:
    """What a full page is found by. Its object stands for all tokens up to its end, and is never used for others."""

    key: _Key
    page: int


@dataclass(eq=False, slots=True)
class KvTable:
    """The pages of one sequence, in order."""

    last: _Block | bytes = field(repr=False)
    """Of the pages that others may find: the last one, or the salt while there is none."""
    pages: array[int] = field(default_factory=lambda: array("q"))
    num_full: int = 0
    """Leading pages that others could find, and that nobody writes to."""


class KvSpace:
    """Hands out the pages of a KvMemory."""

    def __init__(self, memory: KvMemory, *, keeps_prefixes: bool) -> None:
        """Starts with everything free."""
        self.memory = memory
        self._keeps_prefixes = keeps_prefixes
        self._free = list(range(memory.num_pages))
        """Pages with nothing in them, a heap: the first one goes first, so that a sequence's often lie side by side."""
        self._num_users = [0] * memory.num_pages
        self._blocks: dict[_Key, _Block] = {}
        self._block_of: list[_Block | None] = [None] * memory.num_pages
        self._kept: OrderedDict[int, None] = OrderedDict()
        """Pages that can be found and that no sequence has, the one used longest ago first."""
        self._tables: set[KvTable] = set()

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence has, those kept for reuse among them."""
        return len(self._free) + len(self._kept)

    @property
    def num_kept_pages(self) -> int:
        """Pages kept for reuse."""
        return len(self._kept)

    def find(self, tokens: Sequence[int], salt: bytes) -> list[int]:
        """Returns the pages of the longest known beginning of a prompt of that salt; each token is looked at once.

        It only reads, and another thread than the owner's may ask: for it each page was known at some time.
        """
        pages: list[int] = []
        last: _Block | bytes = salt
        while (block := self._blocks.get((last, _piece(tokens, len(pages))))) is not None:
            pages.append(block.page)
            last = block
        return pages

    def free_after(self, num_tokens: int, known: Sequence[int] = ()) -> int:
        """Returns the pages that would be free if a sequence had KV for so many tokens, some of it in known pages."""
        num_taken = num_pages(num_tokens) - len(known) + sum(not self._num_users[page] for page in known)
        return self.num_free_pages - num_taken

    def take(self, num_tokens: int, salt: bytes, known: Sequence[int] = ()) -> KvTable:
        """Returns a table with KV for so many tokens, which begins with the known pages, as they were found."""
        table = KvTable(salt)
        self._tables.add(table)
        for page in known:
            self._use(page)
            table.pages.append(page)
            block = self._block_of[page]
            assert block is not None
            table.last = block
        table.num_full = len(known)
        self.grow(table, num_tokens)
        return table

    def missing(self, table: KvTable, num_tokens: int) -> int:
        """Returns the pages that a table lacks for so many tokens."""
        return max(num_pages(num_tokens) - len(table.pages), 0)

    def grow(self, table: KvTable, num_tokens: int) -> None:
        """Adds the pages that a table lacks for so many tokens; pages kept for reuse are given up if need be.

        Raises:
            EngineError: there are not enough.
        """
        number = self.missing(table, num_tokens)
        if number > self.num_free_pages:
            raise EngineError(f"{number} pages of KV are wanted and {self.num_free_pages} are free")
        pages = [heappop(self._free) if self._free else self._give_up() for _ in range(number)]
        # What was kept of a sequence goes from its end on: as it lay side by side it is to lie again.
        for page in sorted(pages):
            self._num_users[page] = 1
            table.pages.append(page)

    def publish(self, table: KvTable, tokens: Sequence[int]) -> None:
        """Lets others find the full pages of these tokens, with which the table's KV begins.

        Where others know a page of the same tokens after the same ones, the table has that one from now on.
        """
        if not self._keeps_prefixes:
            return
        while table.num_full < len(tokens) // PAGE_TOKENS:
            page, key = table.pages[table.num_full], (table.last, _piece(tokens, table.num_full))
            block = self._blocks.get(key)
            if block is None:
                block = self._blocks[key] = self._block_of[page] = _Block(key, page)
                self._append(table, block)
            else:
                self._adopt(table, block)

    def adopt(self, table: KvTable, tokens: Sequence[int], end: int) -> None:
        """Gives a table, in place of its own pages, what others know by now of these tokens after its full ones."""
        while (key := _next_key(table, tokens, end)) is not None and (block := self._blocks.get(key)) is not None:
            self._adopt(table, block)

    def next_page(self, table: KvTable, tokens: Sequence[int], end: int) -> Hashable | None:
        """Returns the same for all tables that lack the same page of these tokens next.

        None if others could not find it, or if there are no more full pages up to the end.
        """
        return _next_key(table, tokens, end) if self._keeps_prefixes else None

    def release(self, table: KvTable, tokens: Sequence[int] = ()) -> None:
        """Gives a table back; full pages of `tokens`, with which its KV begins, are kept while nobody wants them."""
        self.publish(table, tokens)
        self._tables.remove(table)
        # The last one is wanted least: it is of use only to who has all before it.
        for page in reversed(table.pages):
            self._leave(page)

    def discard(self, table: KvTable) -> None:
        """Gives a table back whose KV may be wrong: nobody finds any of it from now on."""
        for page in table.pages:
            self._hide(page)
        self.release(table)

    def check_integrity(self) -> None:
        """Checks that every page is free, kept, or had by exactly the sequences that are counted as its users.

        Raises:
            EngineError: it is not so, or a page that may be written to has two users.
        """
        users = [0] * self.memory.num_pages
        for table in self._tables:
            for number, page in enumerate(table.pages):
                users[page] += 1
                if number >= table.num_full and (self._num_users[page] != 1 or self._block_of[page] is not None):
                    raise EngineError(f"page {page} is written to by one sequence and had by others")
        unused = sorted((*self._free, *self._kept))
        if users != self._num_users or unused != [page for page, number in enumerate(users) if not number]:
            raise EngineError(f"KV memory is inconsistent: {users} users of pages, {unused} unused")
        found = {block.page: block for block in self._blocks.values()}
        known = {page: block for page, block in enumerate(self._block_of) if block is not None}
        if found != known or len(found) != len(self._blocks) or not known.keys() >= self._kept.keys():
            raise EngineError(f"KV memory is inconsistent: pages {sorted(found)} are found, {sorted(known)} are known")
        if known.keys() & set(self._free):
            raise EngineError("KV memory is inconsistent: free pages can be found")

    def _adopt(self, table: KvTable, block: _Block) -> None:
        """Gives a table a known page in place of the first one that is not full, which nobody else has."""
        own, table.pages[table.num_full] = table.pages[table.num_full], block.page
        self._use(block.page)
        self._leave(own)
        self._append(table, block)

    def _append(self, table: KvTable, block: _Block) -> None:
        """Counts the next page of a table among the full ones."""
        table.last = block
        table.num_full += 1

    def _use(self, page: int) -> None:
        """Gives a known page one user more."""
        if not self._num_users[page]:
            del self._kept[page]
        self._num_users[page] += 1

    def _leave(self, page: int) -> None:
        """Takes a user from a page."""
        self._num_users[page] -= 1
        if not self._num_users[page]:
            if self._block_of[page] is None:
                heappush(self._free, page)
            else:
                self._kept[page] = None

    def _give_up(self) -> int:
        """Returns the page whose use is longest ago, of those that are kept."""
        page, _ = self._kept.popitem(last=False)
        self._hide(page)
        return page

    def _hide(self, page: int) -> None:
        """Lets nobody find a page any more."""
        block = self._block_of[page]
        if block is not None:
            del self._blocks[block.key]
            self._block_of[page] = None


def _next_key(table: KvTable, tokens: Sequence[int], end: int) -> _Key | None:
    """Returns what the first page that a table has not in full is found by; None if it is not full at the end."""
    is_full = (table.num_full + 1) * PAGE_TOKENS <= end
    return (table.last, _piece(tokens, table.num_full)) if is_full else None


def _piece(tokens: Sequence[int], number: int) -> tuple[int, ...]:
    """Returns the tokens of a page; fewer than fit, which are no page's, at the end."""
    return tuple(tokens[number * PAGE_TOKENS : (number + 1) * PAGE_TOKENS])
