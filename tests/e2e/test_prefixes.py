"""What is known of a prompt's beginning helps its own tenant, and tells nothing to another."""

from __future__ import annotations

import pytest

from bucketserve.client import BucketServeClient
from bucketserve.engine.kv_memory import PAGE_TOKENS
from tests.e2e.conftest import NewStack
from tests.e2e.test_stack import run

pytestmark = [pytest.mark.e2e, pytest.mark.engine]
LENGTH = 5 * PAGE_TOKENS + 7
WHOLE = 5 * PAGE_TOKENS


@pytest.mark.parametrize(
    ("environ", "known"),
    [({}, [0, WHOLE, 0, WHOLE, 0, WHOLE]), ({"BUCKETSERVE_GATEWAY_SHARE_PREFIXES": "true"}, [0, *[WHOLE] * 5])],
    ids=["apart", "shared"],
)
async def test_a_tenant_s_kv_is_of_use_to_whoever_may_know_of_it(
    new_stack: NewStack, environ: dict[str, str], known: list[int]
) -> None:
    stack = new_stack(engine="transformers", environ={"BUCKETSERVE_WORKER_NUM_THREADS": "1", **environ})
    found, outputs = [], []
    async with BucketServeClient(stack.gateway_address) as client:
        for tenant in ("alice", "alice", "bob", "bob", "", ""):
            tokens, finished = await run(client, LENGTH, 5, tenant=tenant)
            found.append(finished.usage.cached_prompt_tokens)
            outputs.append(tokens)
    assert found == known
    assert outputs == outputs[:1] * 6
