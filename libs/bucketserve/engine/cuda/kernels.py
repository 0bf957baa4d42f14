"""Triton kernels over KV pages: store new keys and values, attend, put parts of one token's attention together; draws.

One kernel serves prompts and decodes. Its programs have a tile each: tokens of one sequence beside each other, with the
heads that share a KV head, as rows of a matrix product with that head's keys (as FlashAttention's pack_gqa and vLLM's
triton_unified_attention have them). Scores never leave the chip, softmax goes along with the keys (FlashAttention 2,
algorithm 1). Where there are fewer tiles than multiprocessors, a decode's keys are shared out between several programs,
whose results a second kernel weighs (Flash-Decoding).

Everything that changes from step to step is read from device memory, so that a graph holds for any lengths.
"""

# Triton reads the functions' source; tl.constexpr in annotations has to be seen as it is.
import triton
import triton.language as tl

__all__ = ["attend", "combine", "race", "store"]


@triton.jit
def store(
    keys, values, new_keys, new_values, slots,
    key_head_stride, key_token_stride, value_head_stride, value_token_stride,
    new_key_head_stride, new_key_token_stride, new_value_head_stride, new_value_token_stride,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HEAD_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes a token's key and value of one head to its slot; grid (tokens, kv_heads). A negative slot is left out."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + token)
    if slot >= 0:
        at = tl.arange(0, HEAD_BLOCK)
        key = tl.load(new_keys + head * new_key_head_stride + token * new_key_token_stride + at, at < HEAD_DIM)
        tl.store(keys + head * key_head_stride + slot * key_token_stride + at, key, at < HEAD_DIM)
        at = tl.arange(0, VALUE_BLOCK)
        value = tl.load(new_values + head * new_value_head_stride + token * new_value_token_stride + at, at < VALUE_DIM)
        tl.store(values + head * value_head_stride + slot * value_token_stride + at, value, at < VALUE_DIM)


@triton.jit
def attend(
    query, keys, values, output, part_values, part_weights, tiles, table, sinks,
    query_head_stride, query_token_stride, key_head_stride, value_head_stride, output_head_stride, output_token_stride,
    scale, softcap, window, chunk,
    HAS_SINKS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CHUNK: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PAGE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Attention of one tile and KV head to one of PARTS parts of the keys; grid (tiles, kv_heads, PARTS).

    A tile is four numbers: its first token in the packed step, how many there are (0 for none), the first one's
    position in its sequence, and which token of the table the sequence begins with. Row r is token r // GROUP, head
    r % GROUP. With PARTS > 1 tiles have one token, and [tile, head, part] gets its values, not yet divided, and its
    (maximum, sum of weights).
    """
    tile, kv_head, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    first = tl.load(tiles + tile * 4)
    number = tl.load(tiles + tile * 4 + 1)
    position = tl.load(tiles + tile * 4 + 2)
    start = tl.load(tiles + tile * 4 + 3)

    row = tl.arange(0, ROWS)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    is_row = token < number
    at_key, at_value = tl.arange(0, HEAD_BLOCK), tl.arange(0, VALUE_BLOCK)
    q = tl.load(
        query + (first + token)[:, None] * query_token_stride + head[:, None] * query_head_stride + at_key[None, :],
        is_row[:, None] & (at_key < HEAD_DIM)[None, :],
        0.0,
    )
    own = position + token
    end = position + number
    begin = position * 0
    lowest = own * 0
    if HAS_WINDOW:
        lowest = tl.maximum(own - window + 1, 0)
        begin = tl.maximum(position - window + 1, 0)
    if HAS_CHUNK:
        lowest = tl.maximum(own // chunk * chunk, lowest)
        begin = tl.maximum(position // chunk * chunk, begin)
    # Parts are whole blocks of keys, as many for each.
    begin = begin // KEYS * KEYS
    size = tl.cdiv(tl.cdiv(end - begin, KEYS), PARTS) * KEYS
    begin += part * size
    until = tl.minimum(begin + size, end)

    best = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    if HAS_SINKS:
        if part == 0:
            best = tl.load(sinks + head, is_row, 0.0).to(tl.float32)
            weight += 1.0
    total = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
    for low in range(begin, until, KEYS):
        key = low + tl.arange(0, KEYS)
        is_key = key < end
        page = tl.load(table + (start + key) // PAGE, is_key, 0)
        slot = page * PAGE + (start + key) % PAGE
        k = tl.load(
            keys + kv_head * key_head_stride + slot[None, :] * HEAD_DIM + at_key[:, None],
            is_key[None, :] & (at_key < HEAD_DIM)[:, None],
            0.0,
        )
        v = tl.load(
            values + kv_head * value_head_stride + slot[:, None] * VALUE_DIM + at_value[None, :],
            is_key[:, None] & (at_value < VALUE_DIM)[None, :],
            0.0,
        )
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if HAS_SOFTCAP:
            # tanh(x) = 2 sigmoid(2 x) - 1
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        seen = (key[None, :] <= own[:, None]) & (key[None, :] >= lowest[:, None]) & is_row[:, None]
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        # A row that has seen nothing yet stays at nothing, and not at NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - base[:, None])
        shrink = tl.exp(best - base)
        weight = weight * shrink + tl.sum(weights, 1)
        total = total * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        best = higher

    is_value = is_row[:, None] & (at_value < VALUE_DIM)[None, :]
    if PARTS == 1:
        total = total / tl.where(weight == 0.0, 1.0, weight)[:, None]
        place = output + (first + token)[:, None] * output_token_stride + head[:, None] * output_head_stride
        tl.store(place + at_value[None, :], total.to(output.dtype.element_ty), is_value)
    else:
        heads = tl.num_programs(1) * GROUP
        at = (tile * heads + head) * PARTS + part
        is_one = row < GROUP
        tl.store(part_values + at[:, None] * VALUE_BLOCK + at_value[None, :], total, is_one[:, None])
        tl.store(part_weights + at * 2, best, is_one)
        tl.store(part_weights + at * 2 + 1, weight, is_one)


@triton.jit
def combine(
    output, part_values, part_weights, tiles, output_head_stride, output_token_stride,
    VALUE_DIM: tl.constexpr, VALUE_BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Puts the parts of one token and head together; grid (tiles, heads)."""
    tile, head = tl.program_id(0), tl.program_id(1)
    first = tl.load(tiles + tile * 4)
    number = tl.load(tiles + tile * 4 + 1)
    if number > 0:
        at = (tile * tl.num_programs(1) + head).to(tl.int64) * PARTS + tl.arange(0, PARTS)
        at_value = tl.arange(0, VALUE_BLOCK)
        best = tl.load(part_weights + at * 2)
        weight = tl.load(part_weights + at * 2 + 1)
        total = tl.load(part_values + at[:, None] * VALUE_BLOCK + at_value[None, :])
        share = tl.exp(best - tl.max(best, 0))
        result = tl.sum(total * share[:, None], 0) / tl.sum(weight * share, 0)
        place = output + first * output_token_stride + head * output_head_stride
        tl.store(place + at_value, result.to(output.dtype.element_ty), at_value < VALUE_DIM)


@triton.jit
def mixed(value):
    """SplitMix64's finaliser (Steele, Lea, Flood 2014), of uint64."""
    value = value + 0x9E3779B97F4A7C15
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return value ^ (value >> 31)


@triton.jit
def race(scores, tops, temperatures, starts, winners, row_stride, size, BLOCK: tl.constexpr):
    """The token of a row with the highest sum of scaled score and noise, see drawing.race; grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    top, temperature = tl.load(tops + row).to(tl.float64), tl.load(temperatures + row)
    start = tl.load(starts + row).to(tl.uint64, bitcast=True)
    best = tl.full([BLOCK], float("-inf"), tl.float64)
    best_at = tl.zeros([BLOCK], tl.int64)
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK).to(tl.int64)
        score = tl.load(scores + row * row_stride + at, at < size, other=float("-inf")).to(tl.float64)
        bits = mixed(start + at.to(tl.uint64) * 0x9E3779B97F4A7C15)
        uniform = ((bits >> 11).to(tl.float64) + 0.5) * 1.1102230246251565e-16
        # The largest is rounded up to 1. Constants are float32 here.
        uniform -= tl.where(uniform == 1.0, 1.1102230246251565e-16, 0.0)
        value = (score - top) / temperature - tl.log(-tl.log(uniform))
        is_better = value > best
        best = tl.where(is_better, value, best)
        best_at = tl.where(is_better, at, best_at)
    # Of equal ones the lowest id.
    is_winner = best == tl.max(best, 0)
    tl.store(winners + row, tl.min(tl.where(is_winner, best_at, size), 0))
