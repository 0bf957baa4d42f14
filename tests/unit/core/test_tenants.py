"""Tenants are charged with what they use, in time that does not grow with their number."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from bucketserve.core.tenants import OUTPUT_WEIGHT, TenantBook
from tests.builders import a_request


def test_a_tenant_is_charged_for_what_it_used_not_for_what_it_might_have() -> None:
    book = TenantBook()
    first = a_request("a.1", 100, 4000, tenant="loose")
    other = a_request("b.1", 100, 50, tenant="exact")
    book.entered(other)
    book.entered(first)
    assert book.lead("loose") == 100 + OUTPUT_WEIGHT * 4000
    for request in (first, other):
        book.left(request)
        book.ended(request, 50, has_run=True)
    # Both used the same, and the next ones are expected to: its limit gives nobody a lead.
    book.entered(a_request("c.1", 100, 50, tenant="exact"))
    book.entered(a_request("d.1", 100, 4000, tenant="loose"))
    assert book.lead("loose") == 100 + OUTPUT_WEIGHT * 50


def test_further_attempts_and_what_never_ran_cost_nothing() -> None:
    book = TenantBook()
    book.entered(a_request("waits.1", 10, 10, tenant="other"))
    lost, resumed = a_request("a.1", 100, 100, tenant="t"), a_request("a.2", 150, 50, tenant="t", is_resumed=True)
    book.entered(lost)
    before = book.lead("t")
    book.left(lost)
    book.ended(lost, None, has_run=True)
    book.entered(resumed)
    assert book.lead("t") == before
    book.left(resumed)
    book.ended(resumed, 50, has_run=True)
    cancelled = a_request("b.1", 1000, 1000, tenant="t")
    book.entered(cancelled)
    book.left(cancelled)
    book.ended(cancelled, None, has_run=False)
    book.entered(a_request("c.1", 1, 1, tenant="t"))
    assert book.lead("t") <= before + 1 + 2 * OUTPUT_WEIGHT


def test_tenants_that_are_gone_are_forgotten() -> None:
    book = TenantBook()
    steady = a_request("s.1", 10, 10, tenant="steady")
    book.entered(steady)
    for number in range(5_000):
        request = a_request(f"r{number}.1", 10, 10, tenant=f"t{number}")
        book.entered(request)
        book.left(request)
        book.ended(request, 10, has_run=True)
        if number % 100 == 0:
            # Time passes for everybody else as well.
            again = a_request(f"s{number}.1", 100, 100, tenant="steady")
            book.entered(again)
            book.left(again)
            book.ended(again, 100, has_run=True)
    assert len(book) < 500


def test_a_newcomer_is_not_ahead_of_who_was_busy_for_long() -> None:
    book = TenantBook()
    for number in range(500):
        request = a_request(f"a{number}.1", 100, 100, tenant="busy")
        book.entered(request)
        book.left(request)
        if number:
            # One is always open, so that the tenant is never forgotten.
            book.ended(a_request(f"a{number - 1}.1", 100, 100, tenant="busy"), 100, has_run=True)
    for number in range(20):
        book.entered(a_request(f"b{number}.1", 100, 100, tenant="new"))
    book.entered(a_request("next.1", 100, 100, tenant="busy"))
    # No more than what the one request costs.
    assert book.lead("busy") <= 100 + OUTPUT_WEIGHT * 100


class Counting(dict):
    """Counts how often somebody looks."""

    looks = 0

    def get(self, key, default=None):
        Counting.looks += 1
        return super().get(key, default)


def test_the_work_for_a_new_tenant_does_not_grow_with_their_number() -> None:
    costs = []
    for number in (1_000, 4_000):
        book = TenantBook()
        book._tenants = Counting()
        Counting.looks = 0
        for i in range(number):
            request = a_request(f"r{i}.1", 10, 10, tenant=f"t{i}")
            book.entered(request)
            book.lead(request.tenant)
        costs.append(Counting.looks / number)
    assert costs[1] < 2 * costs[0]


steps = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 50), st.integers(1, 50), st.sampled_from(["wait", "run", "end"])),
    max_size=60,
)


@given(steps)
@settings(max_examples=100, deadline=None)
def test_a_lead_is_never_negative_and_somebody_who_waits_has_none(script: list) -> None:
    book = TenantBook()
    waiting: dict[str, list] = {}
    running = []
    for number, (tenant, prompt, output, step) in enumerate(script):
        name = f"t{tenant}"
        if step == "wait":
            request = a_request(f"r{number}.1", prompt, output, tenant=name)
            book.entered(request)
            waiting.setdefault(name, []).append(request)
        elif step == "run" and waiting.get(name):
            request = waiting[name].pop()
            book.left(request)
            running.append(request)
        elif step == "end" and running:
            book.ended(running.pop(), output, has_run=True)
        present = [tenant for tenant, requests in waiting.items() if requests]
        leads = [book.lead(tenant) for tenant in present]
        assert all(lead >= 0 for lead in leads)
        assert not leads or min(leads) == 0
