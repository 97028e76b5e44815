"""Causal attention of packed sequences that may share prompts, forward and backward (FlashAttention-2, arXiv:2307.08691).

Tiles of queries and of keys are counted from the start of their own sequence, and one program gathers all that a tile gets, in a fixed
order: what else is packed changes no bit. The host knows T and S alone and waits for nothing; where sequences lie, and which of them are
wrong, a first kernel writes into a table.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LAYOUT_BLOCK = 1024  # offsets that one program of the table's kernel reads at once
COLUMNS = tl.constexpr(6)  # of the table
ALIGNMENT = 16  # elements of a stride, bytes of an address: what Triton can tell, so that 16 bytes are copied at once, past the registers
LEAST_SIZE = 32  # of a head
DELTA_ROWS = 16
# By kernel, whether fp32, and the head size they go up to: queries and keys of a tile, warps, stages of the loads' pipeline. fp32 has no
# tensor cores: its products are fused multiply-adds whose operands take registers. Larger tiles spill on one architecture or another.
TILES = {
    ("forward", False): {64: (128, 64, 8, 3), 128: (128, 32, 8, 3), 256: (64, 32, 8, 2)},
    ("d_q", False): {64: (64, 64, 4, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)},
    ("d_kv", False): {64: (32, 64, 4, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2)},
    ("forward", True): {64: (32, 16, 4, 2), 128: (16, 16, 4, 2), 256: (16, 16, 8, 2)},
    ("d_q", True): {32: (32, 32, 4, 1), 64: (32, 16, 4, 1), 128: (32, 16, 4, 1), 256: (16, 16, 8, 1)},
    ("d_kv", True): {32: (32, 32, 4, 1), 64: (16, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 4, 2)},
}
NOWHERE = tl.constexpr((1 << 31) - 1)  # position of a key that nobody sees


@triton.jit(do_not_specialize=["count", "tokens"])
def _layout_kernel(
    cu_seqlens_ptr,
    prompts_ptr,
    table_ptr,
    count,
    tokens,
    HAS_PROMPTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for one row of the table int32 [count + 1, COLUMNS] from cu_seqlens [count + 1] and prompts [count].

    Of each sequence: its prompt's first token and one past its last (-1 and -1: it has none), the same of its own tokens, the next sequence
    after it that shares its prompt or follows it (-1: none), and whether its results are NaN, since its prompt is wrong. The last row is
    empty; where the offsets are wrong it has all tokens and that mark, and the other rows are empty.
    """
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    backwards = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, BLOCK):
        mask = start + offs < count
        first = tl.load(cu_seqlens_ptr + start + offs, mask=mask, other=0)
        last = tl.load(cu_seqlens_ptr + start + offs + 1, mask=mask, other=0)
        backwards |= (last < first).to(tl.int32)
    ends = (tl.load(cu_seqlens_ptr) == 0) & (tl.load(cu_seqlens_ptr + count) == tokens)
    good = ends & (tl.max(backwards, axis=0) == 0)
    first = tl.where(good, tl.load(cu_seqlens_ptr + row), 0)
    last = tl.where(good, tl.load(cu_seqlens_ptr + tl.minimum(row + 1, count)), tl.where(row == count, tokens, 0))
    bad = good == 0
    prompt_first, prompt_last, following = -1, -1, -1
    if HAS_PROMPTS:
        prompt = tl.load(prompts_ptr + row, mask=row < count, other=-1).to(tl.int64)
        earlier = good & (prompt >= 0) & (prompt < row)
        follows = earlier & (tl.load(prompts_ptr + prompt, mask=earlier, other=0) == -1)
        bad |= (prompt != -1) & (follows == 0)
        prompt_first = tl.load(cu_seqlens_ptr + prompt, mask=follows, other=-1)
        prompt_last = tl.load(cu_seqlens_ptr + prompt + 1, mask=follows, other=-1)
        shared = tl.where(follows, prompt, row)
        found = tl.full([BLOCK], NOWHERE, tl.int32)
        for start in range(0, count, BLOCK):
            other = start + offs
            theirs = tl.load(prompts_ptr + other, mask=other < count, other=-1)
            found = tl.minimum(found, tl.where((theirs == shared) & (other > row), other, NOWHERE))
        nearest = tl.min(found, axis=0)
        following = tl.where(bad | (nearest == NOWHERE), -1, nearest)
    place = table_ptr + row * COLUMNS
    tl.store(place, prompt_first.to(tl.int32) if HAS_PROMPTS else -1)
    tl.store(place + 1, prompt_last.to(tl.int32) if HAS_PROMPTS else -1)
    tl.store(place + 2, first.to(tl.int32))
    tl.store(place + 3, last.to(tl.int32))
    tl.store(place + 4, following)
    tl.store(place + 5, bad.to(tl.int32))


@triton.jit
def _row_of_tile(table_ptr, rows, tile, BLOCK: tl.constexpr):
    """(the table's row that has this tile, the tile's first token counted from the sequence's).

    Row r has the numbers from first // BLOCK + r on: as many as its tokens take and at times one more, whose tile is empty.
    """
    low, high = 0, rows
    while high - low > 1:
        middle = (low + high) // 2
        begins = tl.load(table_ptr + middle * COLUMNS + 2) // BLOCK + middle <= tile
        low = tl.where(begins, middle, low)
        high = tl.where(begins, high, middle)
    first = tl.load(table_ptr + low * COLUMNS + 2)
    return low, (tile - first // BLOCK - low) * BLOCK


@triton.jit
def _sequence(table_ptr, row, scale):
    """Of a row of the table: (the prompt's first token, how many it has, its own first token, how many, the scale, NaN where it is wrong)."""
    place = table_ptr + row * COLUMNS
    prompt_first = tl.load(place)
    first = tl.load(place + 2)
    scale = tl.where(tl.load(place + 5) != 0, float("nan"), scale)
    return prompt_first, tl.load(place + 1) - prompt_first, first, tl.load(place + 3) - first, scale


@triton.jit
def _key_tiles(prompt, length, begin, window, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Bounds of the tiles of keys, those of the prompt before those of its own, that the queries from `begin` on see."""
    of_prompt = tl.cdiv(prompt, BLOCK_K)
    seen = tl.maximum(prompt + begin - window + 1, 0)
    first = tl.where(seen < prompt, seen // BLOCK_K, of_prompt + (seen - prompt) // BLOCK_K)
    return first, of_prompt + tl.cdiv(tl.minimum(begin + BLOCK_Q, length), BLOCK_K)


@triton.jit
def _keys_of_tile(tile, prompt_first, prompt, first, length, offs_k, BLOCK_K: tl.constexpr):
    """(rows, positions along the prompt and then the sequence, which exist) of a tile's keys."""
    of_prompt = tl.cdiv(prompt, BLOCK_K)
    is_own = tile >= of_prompt
    key = tl.where(is_own, tile - of_prompt, tile) * BLOCK_K + offs_k
    exists = key < tl.where(is_own, length, prompt)
    position = tl.where(exists, key + tl.where(is_own, prompt, 0), NOWHERE)
    return (key + tl.where(is_own, first, prompt_first)).to(tl.int64), position, exists


@triton.jit
def _sees(query, key, window):
    """[queries, keys] from positions: of the keys up to its own a query sees the last `window`."""
    distance = query[:, None] - key[None, :]
    return (distance >= 0) & (distance < window)


@triton.jit(do_not_specialize=["rows", "heads", "group", "window"])
def _packed_attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    out_ptr,
    lse_ptr,
    rows,
    heads,
    group,
    stride_q_t,
    stride_q_h,
    stride_k_t,
    stride_k_h,
    stride_v_t,
    stride_v_h,
    scale,
    window,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    D: tl.constexpr,
):
    """One program for one query head of a tile of queries: out [T, heads, D] and log-sum-exps fp32 [T, heads] (algorithm 1)."""
    # Heads vary fastest: programs that run together read the same keys.
    head = (tl.program_id(0) % heads).to(tl.int64)
    row, begin = _row_of_tile(table_ptr, rows, tl.program_id(0) // heads, BLOCK_Q)
    prompt_first, prompt, first, length, scale = _sequence(table_ptr, row, scale)
    if begin >= length:
        return

    offs_d = tl.arange(0, D)
    offs_k = tl.arange(0, BLOCK_K)
    query = begin + tl.arange(0, BLOCK_Q)
    mask_q = query < length
    token = (first + query).to(tl.int64)
    q_rows = q_ptr + token * stride_q_t + head * stride_q_h
    q = tl.load(q_rows[:, None] + offs_d[None, :], mask=mask_q[:, None], other=0.0)
    k_ptr += (head // group) * stride_k_h
    v_ptr += (head // group) * stride_v_h
    running_max = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, D], tl.float32)
    first_tile, last_tile = _key_tiles(prompt, length, begin, window, BLOCK_Q, BLOCK_K)
    for tile in range(first_tile, last_tile):
        key, position, exists = _keys_of_tile(tile, prompt_first, prompt, first, length, offs_k, BLOCK_K)
        mask_k = exists[:, None]
        k = tl.load((k_ptr + key * stride_k_t)[:, None] + offs_d[None, :], mask=mask_k, other=0.0)  # [BLOCK_K, D]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(_sees(prompt + query, position, window), scores, -float("inf"))
        new_max = tl.maximum(running_max, tl.max(scores, axis=1))
        shift = tl.where(new_max == -float("inf"), 0.0, new_max)  # -inf - shift stays -inf
        factor = tl.exp(running_max - shift)
        p = tl.exp(scores - shift[:, None])
        total = total * factor + tl.sum(p, axis=1)
        v = tl.load((v_ptr + key * stride_v_t)[:, None] + offs_d[None, :], mask=mask_k, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * factor[:, None], input_precision="ieee")
        running_max = new_max

    place = token * heads + head
    tl.store(out_ptr + place[:, None] * D + offs_d[None, :], acc / total[:, None], mask=mask_q[:, None])
    tl.store(lse_ptr + place, running_max + tl.log(total), mask=mask_q)


@triton.jit(do_not_specialize=["count"])
def _delta_kernel(out_ptr, d_out_ptr, delta_ptr, count, D: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """One program for BLOCK_ROWS of the heads [count, D] of all tokens: delta fp32 [count] = d_out out."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_d = tl.arange(0, D)
    places = row[:, None] * D + offs_d[None, :]
    mask = (row < count)[:, None]
    out = tl.load(out_ptr + places, mask=mask, other=0.0).to(tl.float32)
    d_out = tl.load(d_out_ptr + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(delta_ptr + row, tl.sum(d_out * out, axis=1), mask=row < count)


@triton.jit(do_not_specialize=["rows", "heads", "group", "window"])
def _packed_attention_d_q_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    lse_ptr,
    d_out_ptr,
    delta_ptr,
    d_q_ptr,
    rows,
    heads,
    group,
    stride_q_t,
    stride_q_h,
    stride_k_t,
    stride_k_h,
    stride_v_t,
    stride_v_h,
    scale,
    window,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    D: tl.constexpr,
):
    """One program for one query head of a tile of queries: d_q [T, heads, D] (algorithm 2).

    With s = scale q k: p = exp(s - lse), d_s = p (d_out v - delta), d_q = scale d_s k.
    """
    head = (tl.program_id(0) % heads).to(tl.int64)
    row, begin = _row_of_tile(table_ptr, rows, tl.program_id(0) // heads, BLOCK_Q)
    prompt_first, prompt, first, length, scale = _sequence(table_ptr, row, scale)
    if begin >= length:
        return

    offs_d = tl.arange(0, D)
    offs_k = tl.arange(0, BLOCK_K)
    query = begin + tl.arange(0, BLOCK_Q)
    mask_q = query < length
    token = (first + query).to(tl.int64)
    mask = mask_q[:, None]
    q_rows = q_ptr + token * stride_q_t + head * stride_q_h
    q = tl.load(q_rows[:, None] + offs_d[None, :], mask=mask, other=0.0)
    place = token * heads + head
    places = place[:, None] * D + offs_d[None, :]
    d_out = tl.load(d_out_ptr + places, mask=mask, other=0.0)
    delta = tl.load(delta_ptr + place, mask=mask_q, other=0.0)
    lse = tl.load(lse_ptr + place, mask=mask_q, other=0.0)
    k_ptr += (head // group) * stride_k_h
    v_ptr += (head // group) * stride_v_h
    d_q = tl.zeros([BLOCK_Q, D], tl.float32)
    first_tile, last_tile = _key_tiles(prompt, length, begin, window, BLOCK_Q, BLOCK_K)
    for tile in range(first_tile, last_tile):
        key, position, exists = _keys_of_tile(tile, prompt_first, prompt, first, length, offs_k, BLOCK_K)
        mask_k = exists[:, None]
        k = tl.load((k_ptr + key * stride_k_t)[:, None] + offs_d[None, :], mask=mask_k, other=0.0)
        v = tl.load((v_ptr + key * stride_v_t)[:, None] + offs_d[None, :], mask=mask_k, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        d_p = tl.dot(d_out, tl.trans(v), input_precision="ieee")
        seen = _sees(prompt + query, position, window)
        d_s = tl.where(seen, tl.exp(scores - lse[:, None]) * (d_p - delta[:, None]), 0.0)
        d_q = tl.dot(d_s.to(k.dtype), k, d_q, input_precision="ieee")
    tl.store(d_q_ptr + places, d_q * scale, mask=mask)


@triton.jit(do_not_specialize=["rows", "kv_heads", "group", "window"])
def _packed_attention_d_kv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    lse_ptr,
    d_out_ptr,
    delta_ptr,
    d_k_ptr,
    d_v_ptr,
    rows,
    kv_heads,
    group,
    stride_q_t,
    stride_q_h,
    stride_k_t,
    stride_k_h,
    stride_v_t,
    stride_v_h,
    scale,
    window,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    D: tl.constexpr,
):
    """One program for one key head of a tile of keys: d_k and d_v [T, kv_heads, D] from all queries that see it, those of its own sequence first.

    With p and d_s as for d_q: d_v = p d_out, d_k = scale d_s q.
    """
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    heads = kv_heads * group
    row, begin = _row_of_tile(table_ptr, rows, tl.program_id(0) // kv_heads, BLOCK_K)
    prompt_first, _, first, length, scale = _sequence(table_ptr, row, scale)
    if begin >= length:
        return

    offs_d = tl.arange(0, D)
    offs_q = tl.arange(0, BLOCK_Q)
    key = begin + tl.arange(0, BLOCK_K)
    mask_k = key < length
    token = (first + key).to(tl.int64)
    mask = mask_k[:, None]
    k_rows = k_ptr + token * stride_k_t + kv_head * stride_k_h
    v_rows = v_ptr + token * stride_v_t + kv_head * stride_v_h
    k = tl.load(k_rows[:, None] + offs_d[None, :], mask=mask, other=0.0)  # [BLOCK_K, D]
    v = tl.load(v_rows[:, None] + offs_d[None, :], mask=mask, other=0.0)
    d_k = tl.zeros([BLOCK_K, D], tl.float32)
    d_v = tl.zeros([BLOCK_K, D], tl.float32)
    position = tl.where(mask_k, key, NOWHERE)
    last_key = tl.minimum(begin + BLOCK_K, length) - 1
    asking, query_begin, ahead = (
        row,
        begin,
        0,
    )  # `ahead`: tokens before the asking sequence's own, from the keys' first on
    while asking >= 0:
        place = table_ptr + asking * COLUMNS
        query_first = tl.load(place + 2)
        query_end = tl.minimum(tl.load(place + 3) - query_first, last_key + window - ahead)
        tiles = tl.cdiv(tl.maximum(query_end - query_begin, 0), BLOCK_Q)
        for step in range(0, tiles * group):  # a tile's query heads one after another
            head = kv_head * group + step % group
            query = query_begin + step // group * BLOCK_Q + offs_q
            mask_q = query < query_end
            query_token = (query_first + query).to(tl.int64)
            mask_qd = mask_q[:, None]
            q_rows = q_ptr + query_token * stride_q_t + head * stride_q_h
            q = tl.load(q_rows[:, None] + offs_d[None, :], mask=mask_qd, other=0.0)
            place_q = query_token * heads + head
            d_out = tl.load(d_out_ptr + place_q[:, None] * D + offs_d[None, :], mask=mask_qd, other=0.0)
            lse = tl.load(lse_ptr + place_q, mask=mask_q, other=0.0)
            delta = tl.load(delta_ptr + place_q, mask=mask_q, other=0.0)
            seen = tl.trans(_sees(tl.where(mask_q, ahead + query, -1), position, window))
            scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale  # [BLOCK_K, BLOCK_Q]
            p = tl.where(seen, tl.exp(scores - lse[None, :]), 0.0)
            d_v = tl.dot(p.to(v.dtype), d_out, d_v, input_precision="ieee")
            d_p = tl.dot(v, tl.trans(d_out), input_precision="ieee")
            d_s = tl.where(seen, p * (d_p - delta[None, :]), 0.0)
            d_k = tl.dot(d_s.to(k.dtype), q, d_k, input_precision="ieee")
        # What follows a prompt is followed by nothing.
        asking = tl.where(prompt_first < 0, tl.load(place + 4), -1)
        query_begin, ahead = 0, length

    places = (token * kv_heads + kv_head)[:, None] * D + offs_d[None, :]
    tl.store(d_k_ptr + places, d_k * scale, mask=mask)
    tl.store(d_v_ptr + places, d_v, mask=mask)


def tile(kernel: str, head_size: int, itemsize: int) -> tuple[dict[str, int], dict[str, int]]:
    """Sizes of "forward", "d_q" or "d_kv" for heads of `head_size`, a power of 2, and the options of its launch."""
    sizes = TILES[kernel, itemsize == 4]
    queries, keys, warps, stages = sizes[min(size for size in sizes if size >= head_size)]
    return {"BLOCK_Q": queries, "BLOCK_K": keys, "D": head_size}, {"num_warps": warps, "num_stages": stages}


def _aligned(x: Tensor) -> Tensor:
    """x [T, heads, D] with D padded by 0 to a power of 2 from 32 on, and every head at a multiple of 16 elements; itself where it is so already."""
    padding = max(LEAST_SIZE, triton.next_power_of_2(x.shape[2])) - x.shape[2]
    if padding:
        return torch.nn.functional.pad(x, (0, padding))
    strides_fit = x.stride(2) == 1 and x.stride(0) % ALIGNMENT == 0 and x.stride(1) % ALIGNMENT == 0
    return x if strides_fit and x.data_ptr() % ALIGNMENT == 0 else x.clone(memory_format=torch.contiguous_format)


def _table(cu_seqlens: Tensor, prompts: Tensor | None, tokens: int) -> Tensor:
    count = len(cu_seqlens) - 1
    table = torch.empty((count + 1, COLUMNS.value), dtype=torch.int32, device=cu_seqlens.device)
    prompts_ptr = cu_seqlens if prompts is None else prompts.contiguous()
    options = {"HAS_PROMPTS": prompts is not None, "BLOCK": LAYOUT_BLOCK}
    _layout_kernel[(count + 1,)](cu_seqlens.contiguous(), prompts_ptr, table, count, tokens, **options)
    return table


def _programs(tokens: int, table: Tensor, block: int, heads: int) -> tuple[int]:
    """Of which the last have nothing to do where sequences fill their tiles."""
    return ((tokens // block + len(table)) * heads,)


def packed_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, prompts: Tensor | None, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """q [T, Hq, D], k and v [T, Hkv, D], D at most 256, cu_seqlens [S + 1], prompts [S] (-1: none) -> (out [T, Hq, D], log-sum-exps fp32 [T, Hq]).

    window 0 is none. What wrong offsets or a wrong prompt concern is NaN. T is below 2^30.
    """
    tokens, heads, size = q.shape
    q, k, v = map(_aligned, (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((tokens, heads), dtype=torch.float32, device=q.device)
    if tokens:
        blocks, options = tile("forward", q.shape[2], q.element_size())
        with torch.cuda.device_of(q):
            table = _table(cu_seqlens, prompts, tokens)
            _packed_attention_forward_kernel[_programs(tokens, table, blocks["BLOCK_Q"], heads)](
                q,
                k,
                v,
                table,
                out,
                lse,
                len(table),
                heads,
                heads // k.shape[1],
                *_strides(q, k, v),
                scale,
                min(window or tokens, tokens),
                **blocks,
                **options,
            )
    return out[..., :size].contiguous(), lse


def _strides(*heads: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in heads for stride in x.stride()[:2])


def packed_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    prompts: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in their type from that of `out` [T, Hq, D]; sums have a fixed order."""
    tokens, heads, size = q.shape
    q, k, v = map(_aligned, (q, k, v))
    out, d_out = (_aligned(x.contiguous()) for x in (out, d_out))
    kv_heads, width = k.shape[1:]
    d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    if tokens:
        with torch.cuda.device_of(q):
            table = _table(cu_seqlens, prompts, tokens)
            operands = q, k, v, table, lse, d_out, delta
            numbers = heads // kv_heads, *_strides(q, k, v), scale, min(window or tokens, tokens)
            rows = tokens * heads
            _delta_kernel[(triton.cdiv(rows, DELTA_ROWS),)](out, d_out, delta, rows, D=width, BLOCK_ROWS=DELTA_ROWS)
            blocks, options = tile("d_q", width, q.element_size())
            programs = _programs(tokens, table, blocks["BLOCK_Q"], heads)
            _packed_attention_d_q_kernel[programs](*operands, d_q, len(table), heads, *numbers, **blocks, **options)
            blocks, options = tile("d_kv", width, q.element_size())
            programs = _programs(tokens, table, blocks["BLOCK_K"], kv_heads)
            _packed_attention_d_kv_kernel[programs](
                *operands, d_k, d_v, len(table), kv_heads, *numbers, **blocks, **options
            )
    return tuple(x[..., :size].contiguous() for x in (d_q, d_k, d_v))
