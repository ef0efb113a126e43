# pyright: reportMissingImports=false, reportCallIssue=false, reportIndexIssue=false
"""Attention in Triton, made for the few hundred tokens of a vision encoder; gpu.py says when it is used.

General kernels are made for long sequences. A ViT has one token more than a square number, for which a kernel of
blocks of 64 computes 63 too many: what remains after full blocks is a block of its own size here. Packed queries, keys
and values are read as they are, and so are their gradients written: nothing is copied between layouts.

Scores are float32, probabilities are rounded to the dtype of the values for the second product. The backward pass makes
the scores again from the logarithm of each row's sum.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.library import custom_op

BLOCK = 64
"""Rows and columns of scores that are computed at a time."""
SMALLEST = 16
"""The least that matrix units take."""
LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))
"""Exponentials are to base 2. Constants, not arguments: compiled code would pass a float as float64."""
WARPS = 4
"""Best of seven choices on an H200 with three stages, 257 tokens and heads of 64 (docs/decisions.md)."""


@triton.jit
def _at(x, sample_stride, head_stride, heads):
    """Where the sample and head of this program begin."""
    pair = tl.program_id(1)
    return x + (pair // heads).to(tl.int64) * sample_stride + (pair % heads) * head_stride


@triton.jit
def _tile(x, start, end, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    """Tokens from `start` on, (ROWS, WIDTH); zeros from `end` on, which a WHOLE tile does not reach."""
    rows = start + tl.arange(0, ROWS)
    pointers = x + rows[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    if WHOLE:
        return tl.load(pointers)
    return tl.load(pointers, mask=rows[:, None] < end, other=0.0)


@triton.jit
def _store_tile(x, tile, start, end, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    rows = start + tl.arange(0, ROWS)
    pointers = x + rows[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    tl.store(pointers, tile.to(x.dtype.element_ty), mask=rows[:, None] < end)


@triton.jit
def _attend(
    query, k, v, column, row, queries, keys, k_token, v_token, maximum, total, attended,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Take the keys from `column` on into the running softmax of some rows."""
    key = _tile(k, column, keys, k_token, COLUMNS, WIDTH, WHOLE)
    value = _tile(v, column, keys, v_token, COLUMNS, WIDTH, WHOLE)
    scores = tl.dot(query, tl.trans(key)) * (LOG2_E * WIDTH**-0.5)
    if not WHOLE:
        columns = (column + tl.arange(0, COLUMNS))[None, :]
        seen = columns < keys
        if CAUSAL:
            seen = seen & (columns <= (row + tl.arange(0, ROWS))[:, None] + keys - queries)
        scores = tl.where(seen, scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    probabilities = tl.exp2(scores - new_maximum[:, None])
    shrink = tl.exp2(maximum - new_maximum)
    total = total * shrink + tl.sum(probabilities, 1)
    attended = tl.dot(probabilities.to(value.dtype), value, attended * shrink[:, None])
    return new_maximum, total, attended


@triton.jit
def _forward_rows(
    q, k, v, out, sums, row, queries, keys, q_token, k_token, v_token, out_token,
    ROWS: tl.constexpr, CAUSAL: tl.constexpr, KEYS_LEFT: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    # A remainder of more than half a block has a full block's size without being whole.
    query = _tile(q, row, queries, q_token, ROWS, WIDTH, WHOLE)
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    attended = tl.zeros((ROWS, WIDTH), tl.float32)
    # Keys that every row sees, in whole tiles; then the rest.
    whole = keys // SIZE * SIZE
    if CAUSAL:
        whole = (row + keys - queries + 1) // SIZE * SIZE
    for column in range(0, whole, SIZE):
        maximum, total, attended = _attend(
            query, k, v, column, row, queries, keys, k_token, v_token, maximum, total, attended,
            ROWS, SIZE, WIDTH, CAUSAL, True,
        )  # fmt: skip
    if CAUSAL:
        end = tl.minimum(row + ROWS + keys - queries, keys)
        for column in range(whole, end, SIZE):
            maximum, total, attended = _attend(
                query, k, v, column, row, queries, keys, k_token, v_token, maximum, total, attended,
                ROWS, SIZE, WIDTH, CAUSAL, False,
            )  # fmt: skip
    elif KEYS_LEFT > 0:
        maximum, total, attended = _attend(
            query, k, v, whole, row, queries, keys, k_token, v_token, maximum, total, attended,
            ROWS, KEYS_LEFT, WIDTH, CAUSAL, False,
        )  # fmt: skip
    _store_tile(out, attended / total[:, None], row, queries, out_token, ROWS, WIDTH)
    rows = row + tl.arange(0, ROWS)
    tl.store(sums + rows, maximum + tl.log2(total), mask=rows < queries)


@triton.jit
def _forward(
    q, k, v, out, sums, heads, queries, keys,
    q_sample, q_head, q_token, k_sample, k_head, k_token, v_sample, v_head, v_token,
    out_sample, out_head, out_token,
    CAUSAL: tl.constexpr, ROWS_LEFT: tl.constexpr, KEYS_LEFT: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    q, k = _at(q, q_sample, q_head, heads), _at(k, k_sample, k_head, heads)
    v, out = _at(v, v_sample, v_head, heads), _at(out, out_sample, out_head, heads)
    sums += tl.program_id(1).to(tl.int64) * queries
    row = tl.program_id(0) * SIZE
    if row + SIZE <= queries:
        _forward_rows(
            q, k, v, out, sums, row, queries, keys, q_token, k_token, v_token, out_token,
            SIZE, CAUSAL, KEYS_LEFT, WIDTH, SIZE, True,
        )  # fmt: skip
    elif ROWS_LEFT > 0:
        _forward_rows(
            q, k, v, out, sums, row, queries, keys, q_token, k_token, v_token, out_token,
            ROWS_LEFT, CAUSAL, KEYS_LEFT, WIDTH, SIZE, False,
        )  # fmt: skip


@triton.jit
def _row_products(
    grad, out, products, heads, queries,
    grad_sample, grad_head, grad_token, out_sample, out_head, out_token,
    WIDTH: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Of each row the sum of gradient times output, which the gradient of its softmax needs."""
    row = tl.program_id(0) * SIZE
    grad_tile = _tile(_at(grad, grad_sample, grad_head, heads), row, queries, grad_token, SIZE, WIDTH, False)
    out_tile = _tile(_at(out, out_sample, out_head, heads), row, queries, out_token, SIZE, WIDTH, False)
    rows = row + tl.arange(0, SIZE)
    product = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(products + tl.program_id(1).to(tl.int64) * queries + rows, product, mask=rows < queries)


@triton.jit
def _add_row(
    q, grad, key, value, sums, products, grad_key, grad_value, row, column, queries, keys, q_token, grad_token,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Add what the rows from `row` on say of the gradients of some keys and values."""
    query = _tile(q, row, queries, q_token, ROWS, WIDTH, WHOLE)
    out_gradient = _tile(grad, row, queries, grad_token, ROWS, WIDTH, WHOLE)
    rows = row + tl.arange(0, ROWS)
    logarithm = tl.load(sums + rows, mask=rows < queries, other=0.0)
    product = tl.load(products + rows, mask=rows < queries, other=0.0)
    # Transposed, (COLUMNS, ROWS): so both stand on the left of the products below. Rows past the end add nothing.
    probabilities = tl.exp2(tl.dot(key, tl.trans(query)) * (LOG2_E * WIDTH**-0.5) - logarithm[None, :])
    if not WHOLE:
        if CAUSAL:
            columns = column + tl.arange(0, COLUMNS)
            probabilities = tl.where(columns[:, None] <= rows[None, :] + keys - queries, probabilities, 0.0)
    gradients = probabilities * (tl.dot(value, tl.trans(out_gradient)) - product[None, :])
    grad_value = tl.dot(probabilities.to(query.dtype), out_gradient, grad_value)
    grad_key = tl.dot(gradients.to(query.dtype), query, grad_key)
    return grad_key, grad_value


@triton.jit
def _backward_columns(
    q, k, v, grad, sums, products, grad_k, grad_v, column, queries, keys,
    q_token, k_token, v_token, grad_token, grad_k_token, grad_v_token,
    COLUMNS: tl.constexpr, CAUSAL: tl.constexpr, ROWS_LEFT: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    key = _tile(k, column, keys, k_token, COLUMNS, WIDTH, WHOLE)
    value = _tile(v, column, keys, v_token, COLUMNS, WIDTH, WHOLE)
    grad_key = tl.zeros((COLUMNS, WIDTH), tl.float32)
    grad_value = tl.zeros((COLUMNS, WIDTH), tl.float32)
    first, full = 0, 0
    if CAUSAL:
        # Rows before `first` see none of these keys, rows from `full` on see all.
        first = tl.maximum(column - (keys - queries), 0) // SIZE * SIZE
        full = tl.minimum((tl.maximum(column + COLUMNS - 1 - (keys - queries), 0) + SIZE - 1) // SIZE * SIZE, queries)
        for row in range(first, full, SIZE):
            grad_key, grad_value = _add_row(
                q, grad, key, value, sums, products, grad_key, grad_value, row, column, queries, keys,
                q_token, grad_token, SIZE, COLUMNS, CAUSAL, WIDTH, False,
            )  # fmt: skip
    whole = queries // SIZE * SIZE
    for row in range(full, whole, SIZE):
        grad_key, grad_value = _add_row(
            q, grad, key, value, sums, products, grad_key, grad_value, row, column, queries, keys,
            q_token, grad_token, SIZE, COLUMNS, CAUSAL, WIDTH, WHOLE,
        )  # fmt: skip
    if ROWS_LEFT > 0:
        if full <= whole:
            grad_key, grad_value = _add_row(
                q, grad, key, value, sums, products, grad_key, grad_value, whole, column, queries, keys,
                q_token, grad_token, ROWS_LEFT, COLUMNS, CAUSAL, WIDTH, False,
            )  # fmt: skip
    _store_tile(grad_k, grad_key * WIDTH**-0.5, column, keys, grad_k_token, COLUMNS, WIDTH)
    _store_tile(grad_v, grad_value, column, keys, grad_v_token, COLUMNS, WIDTH)


@triton.jit
def _backward_keys(
    q, k, v, grad, sums, products, grad_k, grad_v, heads, queries, keys,
    q_sample, q_head, q_token, k_sample, k_head, k_token, v_sample, v_head, v_token,
    grad_sample, grad_head, grad_token,
    grad_k_sample, grad_k_head, grad_k_token, grad_v_sample, grad_v_head, grad_v_token,
    CAUSAL: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, ROWS_LEFT: tl.constexpr, KEYS_LEFT: tl.constexpr,
):  # fmt: skip
    q, k, v = _at(q, q_sample, q_head, heads), _at(k, k_sample, k_head, heads), _at(v, v_sample, v_head, heads)
    grad = _at(grad, grad_sample, grad_head, heads)
    grad_k = _at(grad_k, grad_k_sample, grad_k_head, heads)
    grad_v = _at(grad_v, grad_v_sample, grad_v_head, heads)
    sums += tl.program_id(1).to(tl.int64) * queries
    products += tl.program_id(1).to(tl.int64) * queries
    column = tl.program_id(0) * SIZE
    if column + SIZE <= keys:
        _backward_columns(
            q, k, v, grad, sums, products, grad_k, grad_v, column, queries, keys,
            q_token, k_token, v_token, grad_token, grad_k_token, grad_v_token,
            SIZE, CAUSAL, ROWS_LEFT, WIDTH, SIZE, True,
        )  # fmt: skip
    elif KEYS_LEFT > 0:
        _backward_columns(
            q, k, v, grad, sums, products, grad_k, grad_v, column, queries, keys,
            q_token, k_token, v_token, grad_token, grad_k_token, grad_v_token,
            KEYS_LEFT, CAUSAL, ROWS_LEFT, WIDTH, SIZE, False,
        )  # fmt: skip


@triton.jit
def _add_columns(
    query, out_gradient, logarithm, product, k, v, grad_query, row, column, queries, keys, k_token, v_token,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Add what the keys from `column` on say of the gradients of some queries."""
    key = _tile(k, column, keys, k_token, COLUMNS, WIDTH, WHOLE)
    value = _tile(v, column, keys, v_token, COLUMNS, WIDTH, WHOLE)
    probabilities = tl.exp2(tl.dot(query, tl.trans(key)) * (LOG2_E * WIDTH**-0.5) - logarithm[:, None])
    if not WHOLE:
        columns = (column + tl.arange(0, COLUMNS))[None, :]
        seen = columns < keys
        if CAUSAL:
            seen = seen & (columns <= (row + tl.arange(0, ROWS))[:, None] + keys - queries)
        probabilities = tl.where(seen, probabilities, 0.0)
    gradients = probabilities * (tl.dot(out_gradient, tl.trans(value)) - product[:, None])
    return tl.dot(gradients.to(key.dtype), key, grad_query)


@triton.jit
def _backward_rows(
    q, k, v, grad, sums, products, grad_q, row, queries, keys,
    q_token, k_token, v_token, grad_token, grad_q_token,
    ROWS: tl.constexpr, CAUSAL: tl.constexpr, KEYS_LEFT: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    query = _tile(q, row, queries, q_token, ROWS, WIDTH, WHOLE)
    out_gradient = _tile(grad, row, queries, grad_token, ROWS, WIDTH, WHOLE)
    grad_query = tl.zeros((ROWS, WIDTH), tl.float32)
    rows = row + tl.arange(0, ROWS)
    logarithm = tl.load(sums + rows, mask=rows < queries, other=0.0)
    product = tl.load(products + rows, mask=rows < queries, other=0.0)
    whole = keys // SIZE * SIZE
    if CAUSAL:
        whole = (row + keys - queries + 1) // SIZE * SIZE
    for column in range(0, whole, SIZE):
        grad_query = _add_columns(
            query, out_gradient, logarithm, product, k, v, grad_query, row, column, queries, keys,
            k_token, v_token, ROWS, SIZE, CAUSAL, WIDTH, True,
        )  # fmt: skip
    if CAUSAL:
        for column in range(whole, tl.minimum(row + ROWS + keys - queries, keys), SIZE):
            grad_query = _add_columns(
                query, out_gradient, logarithm, product, k, v, grad_query, row, column, queries, keys,
                k_token, v_token, ROWS, SIZE, CAUSAL, WIDTH, False,
            )  # fmt: skip
    elif KEYS_LEFT > 0:
        grad_query = _add_columns(
            query, out_gradient, logarithm, product, k, v, grad_query, row, whole, queries, keys,
            k_token, v_token, ROWS, KEYS_LEFT, CAUSAL, WIDTH, False,
        )  # fmt: skip
    _store_tile(grad_q, grad_query * WIDTH**-0.5, row, queries, grad_q_token, ROWS, WIDTH)


@triton.jit
def _backward_queries(
    q, k, v, grad, sums, products, grad_q, heads, queries, keys,
    q_sample, q_head, q_token, k_sample, k_head, k_token, v_sample, v_head, v_token,
    grad_sample, grad_head, grad_token, grad_q_sample, grad_q_head, grad_q_token,
    CAUSAL: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, ROWS_LEFT: tl.constexpr, KEYS_LEFT: tl.constexpr,
):  # fmt: skip
    q, k, v = _at(q, q_sample, q_head, heads), _at(k, k_sample, k_head, heads), _at(v, v_sample, v_head, heads)
    grad, grad_q = _at(grad, grad_sample, grad_head, heads), _at(grad_q, grad_q_sample, grad_q_head, heads)
    sums += tl.program_id(1).to(tl.int64) * queries
    products += tl.program_id(1).to(tl.int64) * queries
    row = tl.program_id(0) * SIZE
    if row + SIZE <= queries:
        _backward_rows(
            q, k, v, grad, sums, products, grad_q, row, queries, keys,
            q_token, k_token, v_token, grad_token, grad_q_token, SIZE, CAUSAL, KEYS_LEFT, WIDTH, SIZE, True,
        )  # fmt: skip
    elif ROWS_LEFT > 0:
        _backward_rows(
            q, k, v, grad, sums, products, grad_q, row, queries, keys,
            q_token, k_token, v_token, grad_token, grad_q_token, ROWS_LEFT, CAUSAL, KEYS_LEFT, WIDTH, SIZE, False,
        )  # fmt: skip


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]
    heads: int
    causal: bool


@custom_op("openvision::self_attention", mutates_args=())
def self_attention(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Unmasked self-attention of packed (B, L, 3 * D) -> (B, L, D), and base-2 log-sums float32 (B, heads, L)."""
    batch, length, width = qkv.shape
    out = qkv.new_empty(batch, length, width // 3)
    sums = qkv.new_empty(batch, heads, length, dtype=torch.float32)
    _launch_forward(*_unpacked(qkv, heads), _heads(out, heads), sums, False)
    return out, sums


@custom_op("openvision::self_attention_backward", mutates_args=())
def _self_attention_backward(grad: Tensor, qkv: Tensor, out: Tensor, sums: Tensor, heads: int) -> Tensor:
    gradients = qkv.new_empty(qkv.shape)
    inputs = (*_unpacked(qkv, heads), _heads(out, heads), sums)
    _launch_backward(_heads(grad, heads), inputs, _unpacked(gradients, heads), False)
    return gradients


@custom_op("openvision::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """q (B, h, Q, d) over k and v (B, h, K, d) -> (B, h, Q, d), and base-2 log-sums float32 (B, h, Q).

    `causal`: query i sees keys up to i + K - Q, so that the last query sees all.
    """
    out, sums = _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    _launch_forward(q, k, v, out, sums, causal)
    return out, sums


@custom_op("openvision::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (_like(x) for x in (q, k, v))
    _launch_backward(grad, (q, k, v, out, sums), (grad_q, grad_k, grad_v), causal)
    return grad_q, grad_k, grad_v


def _save_packed(ctx: _Context, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    ctx.heads = inputs[1]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0], *output)


def _packed_gradient(ctx: _Context, grad: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
    gradient = _self_attention_backward(grad, *ctx.saved_tensors, ctx.heads)
    return gradient, None


def _save(ctx: _Context, inputs: tuple[Tensor, Tensor, Tensor, bool], output: tuple[Tensor, Tensor]) -> None:
    ctx.causal = inputs[3]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:3], *output)


def _gradients(ctx: _Context, grad: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, Tensor, None]:
    return *_attention_backward(grad, *ctx.saved_tensors, ctx.causal), None


@self_attention.register_fake
def _(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    batch, length, width = qkv.shape
    return qkv.new_empty(batch, length, width // 3), qkv.new_empty(batch, heads, length, dtype=torch.float32)


@_self_attention_backward.register_fake
def _(grad: Tensor, qkv: Tensor, out: Tensor, sums: Tensor, heads: int) -> Tensor:
    return qkv.new_empty(qkv.shape)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


self_attention.register_autograd(_packed_gradient, setup_context=_save_packed)
attention.register_autograd(_gradients, setup_context=_save)


def _like(x: Tensor) -> Tensor:
    """New memory for (B, heads, L, d), a token's heads beside each other."""
    batch, heads, length, width = x.shape
    return x.new_empty(batch, length, heads, width).transpose(1, 2)


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, heads * d) as (B, heads, L, d), without a copy."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _unpacked(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """(B, L, 3 * heads * d) as three of (B, heads, L, d), without a copy."""
    return tuple(_heads(part, heads) for part in qkv.chunk(3, dim=2))


def _strides(x: Tensor) -> tuple[int, ...]:
    """Steps between samples, heads and tokens of (B, heads, L, d)."""
    return x.stride()[:3]


def _readable(x: Tensor) -> Tensor:
    """The tensor with the elements of a head beside each other, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _remainder(length: int) -> int:
    """Size of the block that holds what full blocks leave of `length`; 0 where they leave nothing."""
    rest = length % BLOCK
    return 0 if not rest else max(SMALLEST, 1 << (rest - 1).bit_length())


def _stages(width: int) -> int:
    """Blocks that are loaded ahead: with heads of 128 three need more shared memory than an H200 has."""
    return 2 if width > 64 else 3


def _launch_forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, causal: bool) -> None:
    q, k, v = (_readable(x) for x in (q, k, v))
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    grid = (triton.cdiv(queries, BLOCK), batch * heads)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(q):
        _forward[grid](
            q, k, v, out, sums, heads, queries, keys,
            *_strides(q), *_strides(k), *_strides(v), *_strides(out),
            CAUSAL=causal, ROWS_LEFT=_remainder(queries), KEYS_LEFT=_remainder(keys), WIDTH=width, SIZE=BLOCK,
            num_warps=WARPS, num_stages=_stages(width),
        )  # fmt: skip


def _launch_backward(grad: Tensor, inputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...], causal: bool) -> None:
    q, k, v, out, sums = inputs
    q, k, v, grad = (_readable(x) for x in (q, k, v, grad))
    grad_q, grad_k, grad_v = gradients
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    products = torch.empty_like(sums)
    row_blocks, key_blocks = triton.cdiv(queries, BLOCK), triton.cdiv(keys, BLOCK)
    common = {"CAUSAL": causal, "WIDTH": width, "SIZE": BLOCK}
    left = {"ROWS_LEFT": _remainder(queries), "KEYS_LEFT": _remainder(keys)}
    shared = (heads, queries, keys)
    strides = (*_strides(q), *_strides(k), *_strides(v), *_strides(grad))
    with torch.cuda.device_of(q):
        _row_products[(row_blocks, batch * heads)](
            grad, out, products, heads, queries, *_strides(grad), *_strides(out), WIDTH=width, SIZE=BLOCK, num_warps=4
        )
        _backward_keys[(key_blocks, batch * heads)](
            q, k, v, grad, sums, products, grad_k, grad_v, *shared,
            *strides, *_strides(grad_k), *_strides(grad_v), **common, **left,
            num_warps=WARPS, num_stages=_stages(width),
        )  # fmt: skip
        _backward_queries[(row_blocks, batch * heads)](
            q, k, v, grad, sums, products, grad_q, *shared,
            *strides, *_strides(grad_q), **common, **left, num_warps=WARPS, num_stages=_stages(width),
        )  # fmt: skip
