"""The cells of lengths are what one sorted list would be, whatever comes, goes, splits them and is asked for."""

from __future__ import annotations

from contextlib import closing

from hypothesis import given, settings
from hypothesis import strategies as st

from bucketserve.core.cells import WaitingCells
from bucketserve.core.types import Bucket, Request, RequestId

CONTEXT = 64
lengths = st.integers(1, CONTEXT)
operations = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 12), lengths, st.integers(0, 3)),
    st.tuples(st.just("add"), st.integers(0, 12), lengths, st.integers(0, 3)),
    st.tuples(st.just("remove"), st.integers(0, 12)),
    st.tuples(st.just("remove first"), lengths),
    st.tuples(st.just("split"), lengths),
    st.tuples(st.just("walk"), st.integers(0, 5)),
)


def request(number: int, length: int) -> Request:
    return Request(request_id=RequestId(f"r{number}"), prompt_tokens=length, max_new_tokens=1, arrival_s=0.0)


@given(st.lists(operations, max_size=80))
@settings(max_examples=400)
def test_the_cells_are_what_a_sorted_list_would_be(script: list[tuple]) -> None:
    cells, edges = WaitingCells(CONTEXT), {CONTEXT + 1}
    plain: dict[RequestId, tuple[float, Request]] = {}

    def in_order(bucket: Bucket) -> list[RequestId]:
        inside = [(key, each.request_id) for key, each in plain.values() if each.prompt_tokens in bucket]
        return [request_id for _, request_id in sorted(inside)]

    def buckets() -> list[Bucket]:
        ends = sorted(edges)
        return [Bucket(low, high) for low, high in zip((0, *ends), ends, strict=False)]

    for what, *more in script:
        if what == "add":
            number, length, key = more
            cells.remove(RequestId(f"r{number}"))
            cells.add(request(number, length), float(key))
            plain[RequestId(f"r{number}")] = float(key), request(number, length)
        elif what == "remove":
            gone = plain.pop(RequestId(f"r{more[0]}"), (0.0, None))[1]
            assert cells.remove(RequestId(f"r{more[0]}")) == gone
        elif what == "remove first":
            bucket = next(bucket for bucket in buckets() if more[0] in bucket)
            if (head := cells.head(bucket)) is not None:
                assert cells.remove(RequestId(head[2])) == plain.pop(RequestId(head[2]))[1]
        elif what == "split":
            edges.add(more[0])
            cells.split_at(more[0])
        for bucket in buckets():
            ordered = in_order(bucket)
            head = cells.head(bucket)
            assert (head and head[2]) == (ordered[0] if ordered else None)
            most = more[0] if what == "walk" else CONTEXT
            with closing(cells.in_order(bucket)) as walked:
                assert [each.request_id for each, _ in zip(walked, range(most), strict=False)] == ordered[:most]
            assert cells.count(bucket) == (len(ordered), sum(plain[rid][1].prompt_tokens for rid in ordered))
