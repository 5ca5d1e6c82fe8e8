"""The lowest logit that top-k and top-p keep, found digit by digit of its bits, for all rows of a step at once.

Float32 numbers, their bits read as integers of the right order (`_key`), have eight digits of base 16. A launch counts,
for one digit, how many tokens (top-k) or how much of the distribution (top-p) lie at or above each of its 16 values
below the digits that are known; the largest value that still holds enough is the digit. Masses are integers, so that
the order in which programs add them changes nothing.
"""

import triton
import triton.language as tl

DIGITS = tl.constexpr(8)
VALUES = tl.constexpr(16)
COUNTS = tl.constexpr(128)
"""Counters of one search: `DIGITS` x `VALUES`."""
LOWEST_KEY = tl.constexpr(-2147483648)
UNIT = tl.constexpr(1099511627776.0)
"""The mass of a row's likeliest token, 2**40: 2**23 tokens fit into 63 bits."""


@triton.jit
def _key(x):  # type: ignore[no-untyped-def]
    """int32 that is ordered as the float32 x is; both zeros are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _found(counts_ptr, goal, digits):  # type: ignore[no-untyped-def]
    """The first `digits` digits of the highest key at or above which `goal` lies, int64; the others are 0."""
    values = tl.arange(0, VALUES)
    key = tl.full((), LOWEST_KEY, tl.int64)
    for digit in range(digits):
        counts = tl.load(counts_ptr + digit * VALUES + values)
        value = tl.sum((counts.to(tl.float64) >= goal).to(tl.int64), 0) - 1
        key += tl.maximum(value, 0) << (28 - 4 * digit)
    return key


@triton.jit
def _wanted_tokens(top_k_ptr, row, vocab):  # type: ignore[no-untyped-def]
    """How many tokens top-k keeps; 0 stands for all."""
    top_k = tl.load(top_k_ptr + row)
    return tl.where(top_k > 0, tl.minimum(top_k, vocab.to(tl.float64)), vocab.to(tl.float64))


@triton.jit(do_not_specialize=["digit"])  # type: ignore[untyped-decorator]
def count_digit_kernel(  # type: ignore[no-untyped-def]
    counts_ptr,  # [rows, 2, DIGITS, VALUES] int64, zero at first: of tokens, of mass
    logits_ptr,  # [rows, vocab] float32
    tops_ptr,  # [rows] float32, the largest of each row
    top_k_ptr,  # [rows] float64
    top_p_ptr,  # [rows] float64
    stride,
    vocab,
    digit,
    MASS: tl.constexpr,  # top-p's search; else top-k's
    AFTER: tl.constexpr,  # top-k's is over: only what it keeps has mass
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * CHUNK
    own_ptr = counts_ptr + row * (2 * COUNTS)
    first = tl.full((), LOWEST_KEY, tl.int64)
    if MASS:
        if AFTER:
            first = _found(own_ptr, _wanted_tokens(top_k_ptr, row, vocab), DIGITS)
        own_ptr += COUNTS
        goal = tl.load(top_p_ptr + row) * tl.load(own_ptr).to(tl.float64)
    else:
        goal = _wanted_tokens(top_k_ptr, row, vocab)
    values = tl.arange(0, VALUES)
    key = _found(own_ptr, goal, digit)
    candidates = (key + (values.to(tl.int64) << (28 - 4 * digit))).to(tl.int32)
    top = tl.load(tops_ptr + row)
    columns = tl.arange(0, BLOCK)
    held = tl.zeros((BLOCK, VALUES), tl.int64 if MASS else tl.int32)
    for offset in range(start, min(start + CHUNK, vocab), BLOCK):
        inside = offset + columns < vocab
        x = tl.load(logits_ptr + row * stride + offset + columns, mask=inside, other=float("-inf"))
        keys = _key(x)
        if MASS:
            weight = (tl.exp(x - top) * UNIT).to(tl.int64)
            weight = tl.where(inside & (keys >= first.to(tl.int32)), weight, 0)
            held += tl.where(keys[:, None] >= candidates[None, :], weight[:, None], 0)
        else:
            held += ((keys[:, None] >= candidates[None, :]) & inside[:, None]).to(tl.int32)
    tl.atomic_add(own_ptr + digit * VALUES + values, tl.sum(held, 0).to(tl.int64), sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator]
def threshold_kernel(  # type: ignore[no-untyped-def]
    out_ptr,  # [rows] float32
    counts_ptr,
    top_k_ptr,
    top_p_ptr,
    vocab,
    HAS_K: tl.constexpr,
    HAS_P: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    own_ptr = counts_ptr + row * (2 * COUNTS)
    key = tl.full((), LOWEST_KEY, tl.int64)
    filtered = False
    if HAS_K:
        filtered = tl.load(top_k_ptr + row) > 0
        key = _found(own_ptr, _wanted_tokens(top_k_ptr, row, vocab), DIGITS)
    if HAS_P:
        top_p = tl.load(top_p_ptr + row)
        mass = tl.load(own_ptr + COUNTS).to(tl.float64)
        key = tl.where(top_p < 1, _found(own_ptr + COUNTS, top_p * mass, DIGITS), key)
        filtered = filtered | (top_p < 1)
    bits = key.to(tl.int32)
    lowest = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    tl.store(out_ptr + row, tl.where(filtered, lowest, float("-inf")))
