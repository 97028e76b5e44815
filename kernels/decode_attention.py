"""Attention of one new token a sequence over a paged key-value cache, and the write into that cache.

A sequence's keys are cut into splits of `SPLIT_TOKENS`, counted from its start, and a split into tiles: neither the batch, nor the
length of the block table, nor the number of multiprocessors changes the order in which anything is summed. One program attends
to one split (Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html); a second kernel merges a head's splits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._online_softmax import tanh

SPLIT_TOKENS = (
    512  # 256 KiB of keys and values at D = 128 in bf16: few enough for many programs, enough to hide their start
)
BLOCK_SPLITS = 16  # splits of one head that the second kernel merges at once
BLOCK_HEADS = 16  # query heads of one program, the least that a tensor core takes
MOST_TILE_TOKENS = 64  # a page of the engine: a tile then lies in one page
TILE_BYTES = 32 << 10  # keys and values of one tile; an H200's multiprocessor holds three programs with two tiles each
NUM_WARPS = 4
COPY_BLOCK = 1024
INT32_MAX = (1 << 31) - 1


@triton.jit
def _first_key(length, window):
    """The first key that is seen; window 0 sees all."""
    return tl.where(window > 0, tl.maximum(length - window, 0), 0)


@triton.jit
def _checked_length(context_lens_ptr, sequence, capacity):
    """(keys of the sequence as int32, whether their number was out of range); 0 where it was."""
    length = tl.load(context_lens_ptr + sequence).to(tl.int64)
    bad = (length < 0) | (length > capacity)
    return tl.where(bad, 0, length).to(tl.int32), bad


@triton.jit(do_not_specialize=["kv_heads", "group", "pages", "capacity", "splits", "window"])
def _decode_attention_kernel(
    q_ptr,
    k_pages_ptr,
    v_pages_ptr,
    block_table_ptr,
    context_lens_ptr,
    sinks_ptr,
    out_ptr,
    lse_ptr,
    max_sum_ptr,
    kv_heads,
    group,
    pages,
    capacity,
    splits,
    stride_q_b,
    stride_q_h,
    stride_k_page,
    stride_k_token,
    stride_v_page,
    stride_v_token,
    stride_table,
    scale,
    softcap,
    window,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    ONE_SPLIT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
):
    """One program for BLOCK_HEADS query heads of one key head and one split of one sequence; programs beyond its end return at once.

    q [B, Hkv * group, D], pages [P, PAGE_SIZE, Hkv, D or DV], block_table [B, blocks], sinks [Hkv * group]. ONE_SPLIT: out
    [B, Hq, DV] and lse fp32 [B, Hq], the scores' log-sum-exps, are the results. Else out fp32 [B, Hq, splits, DV] gets sum p v, and max_sum
    fp32 [B, Hq, splits, 2] the largest score and sum p, p = exp(score - largest). A page outside of [0, pages) makes that sum NaN and is
    not read.
    """
    head_blocks = tl.cdiv(group, BLOCK_HEADS)
    # Key heads vary fastest: programs that run together read neighbouring memory.
    sequence = (tl.program_id(0) // (kv_heads * head_blocks)).to(tl.int64)
    kv_head = (tl.program_id(0) // head_blocks) % kv_heads
    member = (tl.program_id(0) % head_blocks) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    head = (kv_head * group + member).to(tl.int64)
    mask_h = member < group
    length, bad_length = _checked_length(context_lens_ptr, sequence, capacity)
    first = _first_key(length, window)
    split = first // SPLIT_TOKENS + tl.program_id(1)
    begin = tl.maximum(first, split * SPLIT_TOKENS) // BLOCK_TOKENS * BLOCK_TOKENS
    end = tl.minimum(length, (split + 1) * SPLIT_TOKENS)
    if not ONE_SPLIT:
        if begin >= end:
            return

    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    offs_t = tl.arange(0, BLOCK_TOKENS)
    q_rows = q_ptr + sequence * stride_q_b + head * stride_q_h
    q = tl.load(q_rows[:, None] + offs_d[None, :], mask=mask_h[:, None] & (offs_d < D)[None, :], other=0.0)
    running_max = tl.full([BLOCK_HEADS], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_HEADS], tl.float32)
    if HAS_SINKS:  # a sink is a key whose value is 0, before all others
        sink = tl.load(sinks_ptr + head, mask=mask_h, other=0.0)
        running_max = tl.where(tl.program_id(1) == 0, sink, running_max)
        total = tl.where(tl.program_id(1) == 0, 1.0, total)
    acc = tl.zeros([BLOCK_HEADS, BLOCK_DV], tl.float32)
    bad_page = tl.zeros([BLOCK_TOKENS], tl.int32)
    for start in range(begin, end, BLOCK_TOKENS):
        position = start + offs_t
        wanted = (position >= first) & (position < end)
        table_ptr = block_table_ptr + sequence * stride_table
        if PAGE_SIZE % BLOCK_TOKENS == 0:  # the tile lies in one page
            page = tl.load(table_ptr + start // PAGE_SIZE).to(tl.int64)
        else:
            page = tl.load(table_ptr + position // PAGE_SIZE, mask=wanted, other=0).to(tl.int64)
        visible = wanted & (position < tl.where((page >= 0) & (page < pages), end, 0))
        bad_page |= (wanted != visible).to(tl.int32)
        place = (position % PAGE_SIZE).to(tl.int64)
        k_rows = k_pages_ptr + (page * stride_k_page + place * stride_k_token + kv_head * D)
        mask_k = visible[:, None] & (offs_d < D)[None, :]
        k = tl.load(k_rows[:, None] + offs_d[None, :], mask=mask_k, other=0.0)  # [BLOCK_TOKENS, BLOCK_D]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if HAS_SOFTCAP:
            scores = softcap * tanh(scores / softcap)
        scores = tl.where(visible[None, :], scores, -float("inf"))
        new_max = tl.maximum(running_max, tl.max(scores, axis=1))
        shift = tl.where(new_max == -float("inf"), 0.0, new_max)  # -inf - shift stays -inf
        factor = tl.exp(running_max - shift)
        p = tl.exp(scores - shift[:, None])
        total = total * factor + tl.sum(p, axis=1)
        v_rows = v_pages_ptr + (page * stride_v_page + place * stride_v_token + kv_head * DV)
        mask_v = visible[:, None] & (offs_dv < DV)[None, :]
        v = tl.load(v_rows[:, None] + offs_dv[None, :], mask=mask_v, other=0.0)  # [BLOCK_TOKENS, BLOCK_DV]
        acc = tl.dot(p.to(v.dtype), v, acc * factor[:, None], input_precision="ieee")
        running_max = new_max

    bad = bad_length | (tl.max(bad_page, axis=0) > 0)
    total = tl.where(bad, float("nan"), total)
    mask_out = mask_h[:, None] & (offs_dv < DV)[None, :]
    row = sequence * kv_heads * group + head
    if ONE_SPLIT:
        acc = tl.where((length == 0) & (bad_length == 0), 0.0, acc / total[:, None])
        tl.store(out_ptr + row[:, None] * DV + offs_dv[None, :], acc, mask=mask_out)
        tl.store(lse_ptr + row, running_max + tl.log(total), mask=mask_h)
    else:
        row = row * splits + tl.program_id(1)
        tl.store(out_ptr + row[:, None] * DV + offs_dv[None, :], acc, mask=mask_out)
        tl.store(max_sum_ptr + 2 * row, running_max, mask=mask_h)
        tl.store(max_sum_ptr + 2 * row + 1, total, mask=mask_h)


@triton.jit(do_not_specialize=["heads", "capacity", "splits", "window"])
def _merge_splits_kernel(
    parts_ptr,
    max_sum_ptr,
    context_lens_ptr,
    out_ptr,
    lse_ptr,
    heads,
    capacity,
    splits,
    window,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
):
    """One program for one query head of one sequence: out [B * heads, DV] and lse from parts [B * heads, splits, DV] and max_sum [..., splits, 2].

    One split alone gives the bits that the first kernel would have written: its factor is 1, the absent ones add 0.
    """
    row = tl.program_id(0).to(tl.int64)
    length, bad_length = _checked_length(context_lens_ptr, row // heads, capacity)
    used = tl.cdiv(length, SPLIT_TOKENS) - _first_key(length, window) // SPLIT_TOKENS
    offs_s = tl.arange(0, BLOCK_SPLITS)
    offs_dv = tl.arange(0, BLOCK_DV)
    largest = tl.full([BLOCK_SPLITS], -float("inf"), tl.float32)
    for start in range(0, used, BLOCK_SPLITS):
        part = row * splits + start + offs_s
        part_max = tl.load(max_sum_ptr + 2 * part, mask=start + offs_s < used, other=-float("inf"))
        largest = tl.maximum(largest, part_max)
    top = tl.max(largest, axis=0)
    shift = tl.where(top == -float("inf"), 0.0, top)
    total = 0.0
    out = tl.zeros([BLOCK_DV], tl.float32)
    for start in range(0, used, BLOCK_SPLITS):
        part = row * splits + start + offs_s
        mask_s = start + offs_s < used
        factor = tl.exp(tl.load(max_sum_ptr + 2 * part, mask=mask_s, other=-float("inf")) - shift)
        total += tl.sum(factor * tl.load(max_sum_ptr + 2 * part + 1, mask=mask_s, other=0.0), axis=0)
        mask_part = mask_s[:, None] & (offs_dv < DV)[None, :]
        values = tl.load(parts_ptr + part[:, None] * DV + offs_dv[None, :], mask=mask_part, other=0.0)
        out += tl.sum(factor[:, None] * values, axis=0)
    out = tl.where(length == 0, 0.0, out / total)
    out = tl.where(bad_length, float("nan"), out)
    tl.store(out_ptr + row * DV + offs_dv, out, mask=offs_dv < DV)
    tl.store(lse_ptr + row, tl.where(bad_length, float("nan"), top + tl.log(total)))


@triton.jit
def _copy_heads(source_ptr, stride_head, target_ptr, elements, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Elements [block * BLOCK, ...) of one token's heads [Hkv, SIZE]."""
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < elements
    x = tl.load(source_ptr + (offs // SIZE).to(tl.int64) * stride_head + offs % SIZE, mask=mask)
    tl.store(target_ptr + offs, x, mask=mask)


@triton.jit(do_not_specialize=["kv_heads", "places"])
def _write_kv_kernel(
    k_ptr,
    v_ptr,
    k_pages_ptr,
    v_pages_ptr,
    slots_ptr,
    kv_heads,
    places,
    stride_k_t,
    stride_k_h,
    stride_v_t,
    stride_v_h,
    stride_k_page,
    stride_v_page,
    PAGE_SIZE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for BLOCK elements of one token's key and of its value; a slot outside of [0, places) is skipped."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if (slot < 0) | (slot >= places):
        return
    k_target = k_pages_ptr + (slot // PAGE_SIZE) * stride_k_page + (slot % PAGE_SIZE) * kv_heads * D
    v_target = v_pages_ptr + (slot // PAGE_SIZE) * stride_v_page + (slot % PAGE_SIZE) * kv_heads * DV
    _copy_heads(k_ptr + token * stride_k_t, stride_k_h, k_target, kv_heads * D, D, BLOCK)
    _copy_heads(v_ptr + token * stride_v_t, stride_v_h, v_target, kv_heads * DV, DV, BLOCK)


def _tile(head_size: int, value_size: int, itemsize: int, aligned: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Block sizes, and the options of the launch.

    fp32 has no tensor cores: its products are fused multiply-adds, whose operands take registers. So do loads that are not aligned to
    16 bytes, which cannot go to shared memory directly. A tile's tokens, and so the bits, depend on the cache's layout alone.
    """
    block_d, block_dv = (max(16, triton.next_power_of_2(size)) for size in (head_size, value_size))
    token_bytes = (block_d + block_dv) * itemsize
    fp32 = itemsize == 4
    tokens = 16 if fp32 else min(MOST_TILE_TOKENS, TILE_BYTES // triton.next_power_of_2(token_bytes))
    if aligned:
        launch = {"num_warps": NUM_WARPS, "num_stages": 3 if fp32 or tokens * token_bytes == TILE_BYTES else 4}
    else:
        tokens, launch = max(16, tokens // 2), {"num_warps": 2 * NUM_WARPS, "num_stages": 2}
    return {"BLOCK_TOKENS": tokens, "BLOCK_D": block_d, "BLOCK_DV": block_dv}, launch


def _is_aligned(pages: Tensor) -> bool:
    """Whether Triton can tell that each row of a head begins at a multiple of 16 bytes."""
    token = pages.shape[2] * pages.shape[3]
    return pages.data_ptr() % 16 == 0 and pages.stride(0) % 16 == 0 and token % 16 == 0 and pages.shape[3] % 8 == 0


def _splits(capacity: int, window: int) -> int:
    """Splits that a sequence can touch, from shapes alone: the host does not wait for the lengths."""
    splits = triton.cdiv(capacity, SPLIT_TOKENS)
    return max(1, min(splits, triton.cdiv(window - 1, SPLIT_TOKENS) + 1) if window else splits)


def decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    softcap: float,
    window: int,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """q [B, Hq, D] and block_table [B, blocks] with last stride 1, pages contiguous but for their first dimension.

    context_lens [B] and sinks fp32 [Hq] contiguous; softcap 0 and window 0 are none. Returns [B, Hq, Dv] in q's dtype, and the scores'
    log-sum-exps fp32 [B, Hq]: NaN where a length or a page that is needed is out of range, 0 and -inf where the length is 0.
    """
    batch, heads, head_size = q.shape
    pages, page_size, kv_heads, value_size = v_pages.shape
    out = torch.empty((batch, heads, value_size), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    group = heads // kv_heads
    capacity = min(block_table.shape[1] * page_size, INT32_MAX - 2 * SPLIT_TOKENS)
    splits = _splits(capacity, window)
    aligned = _is_aligned(k_pages) and _is_aligned(v_pages)
    blocks, options = _tile(head_size, value_size, q.element_size(), aligned)
    parts, max_sum = out, out
    if splits > 1:
        parts = torch.empty((batch * heads, splits, value_size), dtype=torch.float32, device=q.device)
        max_sum = torch.empty((batch * heads, splits, 2), dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        _decode_attention_kernel[(batch * kv_heads * triton.cdiv(group, BLOCK_HEADS), splits)](
            q,
            k_pages,
            v_pages,
            block_table,
            context_lens,
            context_lens if sinks is None else sinks,
            parts,
            lse,
            max_sum,
            kv_heads,
            group,
            pages,
            capacity,
            splits,
            q.stride(0),
            q.stride(1),
            k_pages.stride(0),
            kv_heads * head_size,
            v_pages.stride(0),
            kv_heads * value_size,
            block_table.stride(0),
            scale,
            softcap,
            window,
            HAS_SOFTCAP=softcap > 0,
            HAS_SINKS=sinks is not None,
            ONE_SPLIT=splits == 1,
            PAGE_SIZE=page_size,
            D=head_size,
            DV=value_size,
            BLOCK_HEADS=BLOCK_HEADS,
            SPLIT_TOKENS=SPLIT_TOKENS,
            **blocks,
            **options,
        )
        if splits > 1:
            _merge_splits_kernel[(batch * heads,)](
                parts,
                max_sum,
                context_lens,
                out,
                lse,
                heads,
                capacity,
                splits,
                window,
                DV=value_size,
                BLOCK_DV=blocks["BLOCK_DV"],
                BLOCK_SPLITS=BLOCK_SPLITS,
                SPLIT_TOKENS=SPLIT_TOKENS,
                num_warps=NUM_WARPS,
            )
    return out, lse


def write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """k [T, Hkv, D] and v [T, Hkv, Dv] with last stride 1 into pages that are contiguous but for their first dimension; slots [T]."""
    tokens, kv_heads, head_size = k.shape
    pages, page_size, _, value_size = v_pages.shape
    block = min(COPY_BLOCK, triton.next_power_of_2(kv_heads * max(head_size, value_size)))
    with torch.cuda.device_of(k):
        _write_kv_kernel[(tokens, triton.cdiv(kv_heads * max(head_size, value_size), block))](
            k,
            v,
            k_pages,
            v_pages,
            slots,
            kv_heads,
            pages * page_size,
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            k_pages.stride(0),
            v_pages.stride(0),
            PAGE_SIZE=page_size,
            D=head_size,
            DV=value_size,
            BLOCK=block,
            num_warps=NUM_WARPS,
        )
