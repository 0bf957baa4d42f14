"""Hashes of prompts' beginnings, as the scheduler sees them."""

from __future__ import annotations

import xxhash
from hypothesis import given
from hypothesis import strategies as st

from bucketserve.core.prefixes import BLOCK_TOKENS, MAX_BLOCKS
from bucketserve.v1 import inference_pb2, scheduler_pb2
from bucketserve_gateway.prefixes import block_hashes
from bucketserve_gateway.validation import validate
from tests.unit.gateway.builders import an_open_request, catalog

token = st.integers(0, 2**32 - 1)
ids = st.lists(token, max_size=300)


@given(ids, ids, ids)
def test_prompts_have_the_hashes_of_their_common_beginning_in_common(same: list, one: list, other: list) -> None:
    first, second = block_hashes([*same, *one], b"a"), block_hashes([*same, *other], b"a")
    length = next(
        (i for i, (a, b) in enumerate(zip([*same, *one], [*same, *other], strict=False)) if a != b),
        min(len(same) + len(one), len(same) + len(other)),
    )
    common = length // BLOCK_TOKENS
    assert first[:common] == second[:common]
    assert not set(first[common:]) & set(second[common:])


@given(st.lists(token, min_size=BLOCK_TOKENS, max_size=300))
def test_a_salt_keeps_tenants_apart(prompt: list) -> None:
    assert not set(block_hashes(prompt, b"alice")) & set(block_hashes(prompt, b"bob"))
    assert block_hashes(prompt, b"alice") == block_hashes(tuple(prompt), b"alice")
    assert len(block_hashes(prompt, b"")) == len(prompt) // BLOCK_TOKENS


def test_a_salt_is_no_token() -> None:
    prompt = [int.from_bytes(b"bobs", "little")] + [7] * (BLOCK_TOKENS - 1)
    assert block_hashes(prompt, b"") != block_hashes([*prompt[1:], 7], b"bobs")


def test_a_prompt_has_a_bounded_number_of_hashes_and_they_are_xxh3() -> None:
    prompt = range(BLOCK_TOKENS * MAX_BLOCKS + 500)
    hashes = block_hashes(prompt, b"t")
    assert len(hashes) == len(set(hashes)) == MAX_BLOCKS
    whole = b"".join(token.to_bytes(4, "little") for token in prompt[: 2 * BLOCK_TOKENS])
    assert hashes[1] == xxhash.xxh3_64_intdigest(b"\x01\0\0\0t" + whole)


def test_scheduler_and_workers_go_by_the_same_salt_in_every_attempt() -> None:
    valid = validate(inference_pb2.GenerateRequest(prompt="the"), catalog(), max_prompt_bytes=1000)
    opened, prompt = an_open_request(valid, [3] * BLOCK_TOKENS, 90, prefix_salt=b"alice"), [3] * BLOCK_TOKENS
    for _ in range(2):
        run = opened.submission()
        assert list(run.block_hashes) == block_hashes(prompt, b"alice")
        assert scheduler_pb2.RunSpec.FromString(run.spec).prefix_salt == b"alice"
        opened.restart("its worker was lost")


def test_a_resumption_s_hashes_cover_what_was_generated() -> None:
    valid = validate(inference_pb2.GenerateRequest(prompt="the"), catalog(), max_prompt_bytes=1000)
    opened = an_open_request(valid, [3] * (BLOCK_TOKENS - 1), 90)
    assert not opened.submission().block_hashes
    opened.tokens.append(5)
    opened.restart("its worker was lost")
    run = opened.submission()
    assert list(run.block_hashes) == block_hashes([3] * (BLOCK_TOKENS - 1) + [5], b"")
    # What is stored knows nothing of them.
    assert run.ticket.ByteSize() < 100
