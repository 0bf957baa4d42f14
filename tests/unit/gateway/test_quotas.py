"""What a gateway does with quotas when the store says no, or nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from google.rpc import error_details_pb2, status_pb2

from bucketserve.core.errors import OverloadedError, QuotaExceededError, SettingsError, UnavailableError
from bucketserve.rpc.status import status_of
from bucketserve.store.quotas import Refusal
from bucketserve_gateway.auth import Keys
from bucketserve_gateway.keys import Limits, hash_of, new_key
from bucketserve_gateway.quotas import Quotas

KEY = f'[[keys]]\nname = "a"\nsha256 = "{hash_of(new_key())}"\ntenant = "acme"\n'
LIMITS = Limits(name="acme", tokens_per_minute=100, requests_at_once=3)


class Store:
    """Answers as it is told, and remembers what it was asked."""

    def __init__(self, answer: Refusal | Exception | None = None) -> None:
        self.answer = answer
        self.asked: list[tuple] = []

    async def take(self, tenant: str, name: str, num_tokens: int, **limits: int) -> Refusal | None:
        self.asked.append((tenant, num_tokens, limits))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def settle(self, tenant: str, name: str, *, unused: int, tokens: int) -> None:
        self.asked.append((tenant, unused, tokens))
        if isinstance(self.answer, Exception):
            raise self.answer


def quotas(store: Store | None, problems: list[str]) -> Quotas:
    limits = {"acme": LIMITS}
    return Quotas(store, limits.get, problems.append)  # type: ignore[arg-type]


async def settled(it: Quotas) -> None:
    task = asyncio.create_task(it.run())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])


@pytest.mark.parametrize(("asked", "used", "unused"), [(80, 30, 50), (80, 80, 0), (5000, 0, 100), (90, 200, 0)])
async def test_what_was_taken_and_not_used_is_given_back(asked: int, used: int, unused: int) -> None:
    store, problems = Store(), list[str]()
    it = quotas(store, problems)
    charge = await it.take("acme", asked)
    it.settle(charge, used)
    await settled(it)
    assert store.asked == [
        ("acme", asked, {"requests": 0, "tokens": 100, "at_once": 3, "tokens_at_once": 0}),
        ("acme", unused, 100),
    ]
    assert problems == []


@pytest.mark.parametrize(
    ("answer", "given_back", "problem"),
    [
        (None, [("acme", 80, 100)], []),
        (Refusal("tokens a minute", 2.5), [], []),
        (UnavailableError("store: away"), [], ["store: away"]),
    ],
)
async def test_who_leaves_while_it_is_being_taken_gets_all_back(
    answer: Refusal | Exception | None, given_back: list[tuple], problem: list[str]
) -> None:
    class Slow(Store):
        async def take(self, *args, **limits) -> Refusal | None:
            # A server does what it was asked, whether or not somebody waits for the answer.
            await asyncio.sleep(0.01)
            return await super().take(*args, **limits)

    store, problems = Slow(answer), list[str]()
    it = quotas(store, problems)
    task = asyncio.create_task(it.take("acme", 80))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    await settled(it)
    assert store.asked[1:] == given_back
    assert problems == problem


async def test_whom_nothing_limits_costs_no_round_trip() -> None:
    store = Store(UnavailableError("away"))
    it = quotas(store, [])
    it.settle(await it.take("other", 10), 5)
    await settled(it)
    assert store.asked == []


async def test_a_refusal_says_which_limit_and_when() -> None:
    it = quotas(Store(Refusal("tokens a minute", 2.5)), [])
    with pytest.raises(QuotaExceededError, match="tenant 'acme' has used its tokens a minute") as caught:
        await it.take("acme", 10)
    status = status_pb2.Status.FromString(dict(status_of(caught.value).trailing_metadata)["grpc-status-details-bin"])
    failure, retry, info = (
        error_details_pb2.QuotaFailure(),
        error_details_pb2.RetryInfo(),
        error_details_pb2.ErrorInfo(),
    )
    assert [any(detail.Unpack(kind) for detail in status.details) for kind in (failure, retry, info)] == [True] * 3
    assert (failure.violations[0].subject, retry.retry_delay.ToMilliseconds()) == ("tenant:acme", 2500)
    assert info.reason == "QUOTA_EXCEEDED"
    # What takes refusals in stride, such as the runner of jobs, takes this one too.
    assert isinstance(caught.value, OverloadedError)


async def test_a_store_that_is_away_holds_nobody_up_and_is_reported() -> None:
    store, problems = Store(UnavailableError("store: away")), list[str]()
    it = quotas(store, problems)
    assert await it.take("acme", 10) is None
    store.answer = None
    charge = await it.take("acme", 10)
    store.answer = UnavailableError("store: gone")
    it.settle(charge, 5)
    await settled(it)
    assert problems == ["store: away", "store: gone"]
    assert await quotas(None, problems).take("acme", 10) is None
    assert problems[-1] == "there is no redis_url"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('[[tenants]]\ntokens_per_minute = 5\n', r"tenants\[0\].name: Field required"),
        ('[[tenants]]\nname = "a"\ntokens_per_minute = -1\n', r"tenants\[0\].tokens_per_minute: .*greater than"),
        ('[[tenants]]\nname = "a"\ntokens_per_minute = 1.5\n', r"tenants\[0\].tokens_per_minute: .*valid integer"),
        ('[[tenants]]\nname = "a"\ntokens_per_minute = true\n', r"tenants\[0\].tokens_per_minute: .*valid integer"),
        ('[[tenants]]\nname = "a"\nrequests = 1\n', r"tenants\[0\].requests: Extra inputs"),
        ('[[tenants]]\nname = "a"\n[[tenants]]\nname = "a"\n', "name 'a' is there twice"),
        ('[tenants]\nname = "a"\n', r"write \[\[tenants\]\], not \[tenants\]"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_tenant_s_table_is_said(content: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text(KEY + content)
    with pytest.raises(SettingsError, match=problem):
        Keys(str(tmp_path / "keys.toml"))


def test_a_tenant_without_a_table_has_everybody_s(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(KEY + '[[tenants]]\nname = "acme"\nrequests_at_once = 2\n')
    keys = Keys(str(file))
    assert keys.has_limits and not Keys("").has_limits
    assert keys.limits_of("acme") == Limits(name="acme", requests_at_once=2)
    assert keys.limits_of("other") is None
    file.write_text(file.read_text() + '[[tenants]]\nname = "*"\nrequests_per_minute = 7\n')
    assert keys.limits_of("other") == Limits(name="*", requests_per_minute=7)
