"""Each kernel computes what its formula says, for shapes that fill vectors and shapes that do not."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from bucketserve.core.errors import EngineError
from bucketserve.engine.native.kernels import Epilogue, Kernels, load_kernels
from bucketserve.engine.native.products import ACTIVATIONS
from tests.kernel_paths import INSTRUCTION_SETS
from tests.race_cases import check_not_finite, check_race

pytestmark = pytest.mark.engine
FLOAT, HALF = torch.float32, torch.bfloat16


@pytest.fixture(scope="module", params=INSTRUCTION_SETS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return load_kernels(request.param)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def relative(result: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((result.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 13, 64, 97, 300])
@pytest.mark.parametrize(("columns", "depth"), [(16, 16), (50, 33), (96, 64), (130, 1100), (256, 2049)])
@pytest.mark.parametrize(("x_type", "weight_type"), [(FLOAT, FLOAT), (FLOAT, HALF), (HALF, HALF)])
def test_product(
    kernels: Kernels, rows: int, columns: int, depth: int, x_type: torch.dtype, weight_type: torch.dtype
) -> None:
    x, weight = torch.randn(rows, depth).to(x_type), torch.randn(columns, depth).to(weight_type)
    bias, onto = torch.randn(columns), torch.randn(rows, columns).to(x_type)
    plain, biased = kernels.pack([weight], is_int8=False), kernels.pack([weight], bias, is_int8=False)
    # Where a processor multiplies bfloat16 with bfloat16, rows are rounded to it; sums are never.
    rows_used = x.to(HALF) if weight_type is HALF and kernels.rounds_rows else x
    wanted = rows_used.double() @ weight.double().T
    tolerance = 1e-6 if x_type is FLOAT else 4e-3
    out = torch.full((rows, columns), math.nan, dtype=x_type)
    kernels.product(x, plain, out, Epilogue.WRITE)
    assert relative(out, wanted) < tolerance
    kernels.product(x, biased, out, Epilogue.WRITE)
    assert relative(out, wanted + bias) < tolerance
    out.copy_(onto)
    kernels.product(x, biased, out, Epilogue.ADD)
    assert relative(out, wanted + bias + onto) < tolerance


@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize(("columns", "depth"), [(16, 16), (50, 33), (96, 2049)])
@pytest.mark.parametrize("x_type", [FLOAT, HALF])
def test_product_with_8_bit_weights(kernels: Kernels, rows: int, columns: int, depth: int, x_type: torch.dtype) -> None:
    x, weight = torch.randn(rows, depth).to(x_type), torch.randn(columns, depth)
    # Rows and columns of very different sizes: each has a scale of its own.
    weight *= torch.logspace(-3, 3, columns)[:, None]
    x *= torch.logspace(-2, 2, rows)[:, None].to(x_type)
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    rounded = (weight / scale).round() * scale
    out = torch.empty(rows, columns, dtype=x_type)
    kernels.product(x, kernels.pack([weight], is_int8=True), out, Epilogue.WRITE)
    wanted = x.double() @ rounded.double().T
    assert relative(out, wanted) < (1e-3 if x_type is FLOAT else 4e-3)
    smallest = out.double()[:, 0], wanted[:, 0]
    assert relative(*smallest) < 5e-3


def test_8_bit_sums_do_not_overflow(kernels: Kernels) -> None:
    # The worst case: everything at its largest and of one sign.
    x, weight = torch.ones(6, 30_000), torch.ones(16, 30_000)
    out = torch.empty(6, 16)
    kernels.product(x, kernels.pack([weight], is_int8=True), out, Epilogue.WRITE)
    assert out.tolist() == [[pytest.approx(30_000, rel=1e-6)] * 16] * 6


def test_a_row_of_zeros_stays_zero_with_8_bit_weights(kernels: Kernels) -> None:
    out = torch.empty(1, 16)
    kernels.product(torch.zeros(1, 40), kernels.pack([torch.randn(16, 40)], is_int8=True), out, Epilogue.WRITE)
    assert not out.any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("x_type", [FLOAT, HALF])
@pytest.mark.parametrize("is_int8", [False, True])
def test_a_row_that_is_not_finite_has_no_finite_products_and_harms_no_other(
    kernels: Kernels, is_int8: bool, x_type: torch.dtype, value: float
) -> None:
    for depth, rows in itertools.product((1, 7, 16, 37, 64), (1, 3, 20)):
        packed = kernels.pack([torch.randn(33, depth)], is_int8=is_int8)
        for at in {0, depth // 2, depth - 1}:
            x, out = torch.randn(rows, depth).to(x_type), torch.empty(rows, 33, dtype=x_type)
            x[rows // 2, at] = value
            kernels.product(x, packed, out, Epilogue.WRITE)
            is_finite = out.isfinite()
            assert not is_finite[rows // 2].any(), (depth, rows, at)
            assert is_finite.sum() == 33 * (rows - 1)


@pytest.mark.parametrize("rows", [1, 9, 120])
@pytest.mark.parametrize("columns", [16, 24, 80])
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("epilogue", ACTIVATIONS)
def test_gated_product(kernels: Kernels, rows: int, columns: int, is_int8: bool, epilogue: Epilogue) -> None:
    x, gate, up = torch.randn(rows, 64), torch.randn(columns, 64), torch.randn(columns, 64)
    out = torch.empty(rows, columns)
    kernels.product(x, kernels.pack([gate, up], is_pair=True, is_int8=is_int8), out, epilogue)
    wanted = ACTIVATIONS[epilogue](x.double() @ gate.double().T) * (x.double() @ up.double().T)
    assert relative(out, wanted) < (0.02 if is_int8 else 1e-6)


def test_parts_stand_side_by_side(kernels: Kernels) -> None:
    x, parts = torch.randn(5, 32), [torch.randn(columns, 32) for columns in (48, 16, 16)]
    out = torch.empty(5, 80)
    kernels.product(x, kernels.pack(parts, is_int8=False), out, Epilogue.WRITE)
    torch.testing.assert_close(out, torch.cat([x @ part.T for part in parts], dim=1))


def plain_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """[new, heads, dim] from query [new, heads, dim] and a sequence's keys and values [kv_heads, context, dim]."""
    new, heads, _ = query.shape
    kv_heads, context, _ = keys.shape
    keys, values = (part.double().repeat_interleave(heads // kv_heads, dim=0) for part in (keys, values))
    scores = query.double().transpose(0, 1) @ keys.transpose(1, 2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    distance = torch.arange(context - new, context)[:, None] - torch.arange(context)[None, :]
    hidden = (distance < 0) | (distance >= (window or context))
    return (torch.softmax(scores.masked_fill(hidden, -math.inf), dim=-1) @ values).transpose(0, 1)


ATTENTION = list(
    itertools.product(
        [(4, 4), (6, 2), (16, 1)],
        [16, 32, 64, 80, 96, 128],
        [None, 1, 20, 70],
        [None, 5.0],
        [(FLOAT, FLOAT), (FLOAT, HALF), (HALF, HALF)],
    )
)


@pytest.mark.parametrize(
    ("group", "dim", "window", "softcap", "types"),
    random.Random(2).sample(ATTENTION, 60),
)
def test_attention(
    kernels: Kernels,
    group: tuple[int, int],
    dim: int,
    window: int | None,
    softcap: float | None,
    types: tuple[torch.dtype, torch.dtype],
) -> None:
    (heads, kv_heads), (q_type, kv_type) = group, types
    assert kernels.suits_heads(dim, q_type)
    # Whole prompts, chunks of longer ones, and single tokens, of lengths around the sizes of blocks.
    shapes = [(1, 1), (1, 64), (1, 65), (1, 300), (70, 70), (3, 130), (129, 200), (64, 64)]
    arena = torch.randn(2, kv_heads, 1200, dim).to(kv_type)
    segments, first, start = [], 0, 7
    for new, context in shapes:
        segments.append((first, new, start, context))
        first, start = first + new, start + context + 3
    # Scores far from zero as well: their maximum must not matter.
    query = (torch.randn(heads, first, dim) * 3).to(q_type).transpose(0, 1)
    outs = []
    # In pages of sizes that divide a block of keys and that do not; in one run, and anywhere.
    for page_tokens, is_shuffled in ((1200, False), (32, True), (8, True), (3, True)):
        number = 1200 // page_tokens
        pages = torch.randperm(number) if is_shuffled else torch.arange(number)
        places = (pages[:, None] * page_tokens + torch.arange(page_tokens)).flatten()
        paged = torch.zeros(2, kv_heads, number * page_tokens, dim, dtype=kv_type)
        paged[:, :, places] = arena[:, :, : number * page_tokens]
        outs.append(torch.full((first, heads, dim), math.nan, dtype=q_type))
        kernels.attention(
            query,
            paged[0],
            paged[1],
            torch.tensor(segments),
            pages,
            outs[-1],
            page_tokens=page_tokens,
            scale=dim**-0.5,
            window=window,
            softcap=softcap,
        )
    for begin, new, at, context in segments:
        keys, values = (part[:, at : at + context] for part in arena)
        wanted = plain_attention(query[begin : begin + new], keys, values, dim**-0.5, window, softcap)
        assert relative(outs[0][begin : begin + new], wanted) < (2e-6 if q_type is FLOAT else 4e-3), (new, context)
    # Where pages are makes no difference, to the bit.
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize(("x_type", "kv_type"), [(FLOAT, FLOAT), (FLOAT, HALF), (HALF, HALF)])
@pytest.mark.parametrize("dim", [16, 64, 80, 96])
def test_rotate_and_store(
    kernels: Kernels, dim: int, has_norms: bool, x_type: torch.dtype, kv_type: torch.dtype
) -> None:
    heads, kv_heads, rows = 4, 2, 9
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim).to(x_type)
    angles = torch.rand(rows, dim // 2).repeat(1, 2) * 6
    cos, sin = angles.cos().to(x_type), angles.sin().to(x_type)
    norms = (torch.rand(dim) + 0.5, torch.rand(dim) + 0.5, 1e-5) if has_norms else None
    keys, values = torch.zeros(kv_heads, 40, dim, dtype=kv_type), torch.zeros(kv_heads, 40, dim, dtype=kv_type)
    slots = torch.randperm(40)[:rows]
    parts = qkv.double().view(rows, -1, dim).split([heads, kv_heads, kv_heads], dim=1)

    def turned(x: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        if norm is not None:
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * norm
        low, high = x.chunk(2, dim=-1)
        return x * cos.double()[:, None] + torch.cat((-high, low), dim=-1) * sin.double()[:, None]

    wanted = turned(parts[0], norms and norms[0]), turned(parts[1], norms and norms[1])
    kernels.rotate_and_store(qkv, heads, cos, sin, norms, keys, values, slots)
    tolerance = 1e-6 if x_type is kv_type is FLOAT else 8e-3
    assert relative(qkv[:, : heads * dim], wanted[0].reshape(rows, -1)) < tolerance
    assert relative(keys[:, slots].transpose(0, 1), wanted[1]) < tolerance
    torch.testing.assert_close(values[:, slots].transpose(0, 1), parts[2].to(kv_type))
    untouched = torch.ones(40, dtype=torch.bool).index_fill(0, slots, False)
    assert not keys[:, untouched].any()
    assert not values[:, untouched].any()


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_rms_norm(kernels: Kernels, dtype: torch.dtype) -> None:
    x, weight, onto = torch.randn(5, 64).to(dtype), torch.rand(64), torch.randn(5, 64).to(dtype)
    out = torch.empty_like(x)
    kernels.rms_norm(x, weight, 1e-6, out)
    wanted = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-6) * weight
    assert relative(out, wanted) < (1e-6 if dtype is FLOAT else 4e-3)
    out.copy_(onto)
    kernels.rms_norm(x, weight, 1e-6, out, is_added=True)
    assert relative(out, wanted + onto) < (1e-6 if dtype is FLOAT else 4e-3)


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("epilogue", ACTIVATIONS)
def test_gate(kernels: Kernels, dtype: torch.dtype, epilogue: Epilogue) -> None:
    x, out = torch.randn(5, 64).to(dtype), torch.empty(5, 32, dtype=dtype)
    # Also where e^x leaves the range of float32.
    extreme = torch.cat([x[:, :32] * 100, x[:, 32:]], dim=1)
    kernels.gate(extreme, out, epilogue)
    wanted = ACTIVATIONS[epilogue](extreme[:, :32].double()) * extreme[:, 32:].double()
    assert relative(out, wanted) < (1e-6 if dtype is FLOAT else 4e-3)


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize(("columns", "depth"), [(16, 16), (50, 33), (96, 64)])
def test_rows_of_packed_weights_are_the_weights(kernels: Kernels, columns: int, depth: int, dtype: torch.dtype) -> None:
    weight, ids = torch.randn(columns, depth).to(dtype), torch.randint(0, columns, (70,))
    assert torch.equal(kernels.pack([weight], is_int8=False).rows(ids), weight[ids])


def test_threads_change_nothing(kernels: Kernels) -> None:
    before = torch.get_num_threads()
    x, weights = torch.randn(200, 96), kernels.pack([torch.randn(64, 96)], is_int8=False)
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(torch.empty(200, 64))
            kernels.product(x, weights, results[-1], Epilogue.WRITE)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [FLOAT, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 50, 5000, 128_256])
@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0, 30.0])
def test_race(kernels: Kernels, size: int, scale: float, dtype: torch.dtype) -> None:
    check_race(kernels.race, size, scale, dtype)


def test_a_race_of_what_is_not_finite_has_some_winner(kernels: Kernels) -> None:
    check_not_finite(kernels.race)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8])
def test_what_is_of_another_type_is_refused_and_not_read_as_something_else(
    kernels: Kernels, dtype: torch.dtype
) -> None:
    def ones(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype)

    weights, right = kernels.pack([ones(16, 16, dtype=FLOAT)], is_int8=False), ones(1, 16, dtype=FLOAT)
    whole, keys = torch.zeros(1, dtype=torch.int64), ones(1, 1, 16, dtype=FLOAT)
    segments = torch.tensor([[0, 1, 0, 1]])
    sizes = {"page_tokens": 1, "scale": 1.0, "window": None, "softcap": None}
    norms = ones(16), ones(16), 1e-6
    query, qkv = keys.clone(), ones(1, 48, dtype=FLOAT)
    calls = [
        lambda: kernels.pack([ones(16, 16)], is_int8=False),
        lambda: kernels.pack([ones(16, 16), ones(16, 16, dtype=HALF)], is_pair=True, is_int8=False),
        lambda: kernels.product(ones(1, 16), weights, ones(1, 16), Epilogue.WRITE),
        lambda: kernels.product(right, weights, ones(1, 16), Epilogue.WRITE),
        lambda: kernels.product(right, weights, ones(1, 16, dtype=HALF), Epilogue.WRITE),
        lambda: kernels.attention(ones(1, 1, 16), keys, keys, segments, whole, ones(1, 1, 16), **sizes),
        lambda: kernels.attention(query, ones(1, 1, 16), ones(1, 1, 16), segments, whole, query, **sizes),
        lambda: kernels.attention(query.bfloat16(), keys, keys, segments, whole, query.bfloat16(), **sizes),
        lambda: kernels.attention(query, keys, keys, segments.int(), whole, query, **sizes),
        lambda: kernels.rotate_and_store(ones(1, 48), 1, right, right, None, keys, keys, whole),
        lambda: kernels.rotate_and_store(qkv, 1, ones(1, 16), right, None, keys, keys, whole),
        lambda: kernels.rotate_and_store(qkv, 1, right, right, norms, keys, keys, whole),
        lambda: kernels.rotate_and_store(qkv, 1, right, right, None, keys, keys, whole.int()),
        lambda: kernels.rms_norm(ones(1, 16), right[0], 1e-6, ones(1, 16)),
        lambda: kernels.rms_norm(right, ones(16), 1e-6, right),
        lambda: kernels.gate(ones(1, 32), ones(1, 16), Epilogue.SILU_MUL),
        lambda: kernels.race(right, torch.ones(1, 1), whole),
        lambda: kernels.race(right.half(), torch.ones(1, 1, dtype=torch.float64), whole),
    ]
    for number, call in enumerate(calls):
        try:
            call()
        except EngineError as error:
            assert "take" in str(error)
        else:
            pytest.fail(f"call {number} was taken")
