// Attention of one new token a sequence over a paged key-value cache: online softmax over the keys, each key and value loaded once for all the
// query heads that share it. Rows may also be consecutive tokens of one prompt, whose keys are all in the cache: some of them share a load.
#include "attention.h"

namespace fastppo::FASTPPO_ISA {
namespace {

constexpr int64_t kProductsWorthAThread = 1 << 17;  // about 10 microseconds, several times what it takes to wake a thread
constexpr int64_t kTileBytes = 1 << 17;  // of the key heads' tiles at a time, in L2
constexpr int64_t kRowsTogether = 8;  // most rows of a prompt for which a tile is loaded once

// How many rows from `row` on are consecutive tokens of one prompt, which see the same keys but for their own: at most `most`.
int64_t rows_of_a_prompt(const DecodeAttention& a, int64_t row, int64_t most) {
  int64_t rows = 1;
  for (; rows < most; ++rows) {
    const int64_t length = a.context_lens[row] + rows, blocks = (length + a.page_size - 1) / a.page_size;
    const int32_t *table = a.block_table + row * a.max_blocks, *next = table + rows * a.max_blocks;
    if (a.context_lens[row + rows] != length || first_key(a.window, length) > 0 || !std::equal(table, table + blocks, next)) break;
  }
  return rows;
}

// Keys from .. from + count, which may lie in two pages, read in the order in which they lie: head by head, memory gives less than it can.
template <class Storage, int kVectors>
FASTPPO_INLINE void load_tiles(
    const DecodeAttention& a, const AttentionShape& shape, const int32_t* blocks, int64_t from, int count, int64_t first_kv, int64_t last_kv,
    Tile<kVectors>* tiles) {
  using T = typename Storage::type;
  int64_t block = from / a.page_size, offset = from % a.page_size;
  for (int key = 0; key < count; ++key) {
    const T* k_row = static_cast<const T*>(a.k_pages) + blocks[block] * a.k_page_stride + offset * a.kv_heads * a.head_size;
    const T* v_row = static_cast<const T*>(a.v_pages) + blocks[block] * a.v_page_stride + offset * a.kv_heads * a.value_size;
    load_key<Storage, kVectors>(shape, k_row, v_row, first_kv, last_kv, key, tiles);
    if (++offset == a.page_size) ++block, offset = 0;
  }
}

int64_t first_bad_sequence(const DecodeAttention& a) {
  for (int64_t i = 0; i < a.batch; ++i) {
    if (a.context_lens[i] < 0 || a.context_lens[i] > a.max_blocks * a.page_size) return i;
    for (int64_t block = first_key(a.window, a.context_lens[i]) / a.page_size; block * a.page_size < a.context_lens[i]; ++block) {
      const int32_t page = a.block_table[i * a.max_blocks + block];
      if (page < 0 || page >= a.pages) return i;
    }
  }
  return -1;
}

}  // namespace

int64_t decode_attention(const DecodeAttention& a, int threads) {
  const int64_t bad = first_bad_sequence(a);
  if (bad >= 0) return bad;
  const AttentionShape shape{a.heads, a.kv_heads, a.head_size, a.value_size, a.scale, a.softcap, a.window, a.sinks};
  const int64_t group = a.heads / a.kv_heads;
  int64_t keys = 0;
  for (int64_t i = 0; i < a.batch; ++i) keys += a.context_lens[i] - first_key(a.window, a.context_lens[i]);
  const int64_t products = a.batch ? keys * group * (a.head_size + a.value_size) / a.batch + 1 : 1;  // of a sequence's key head, on average
  parallel_ranges(a.batch * a.kv_heads, threads, (kProductsWorthAThread + products - 1) / products, [&](int64_t first, int64_t last) {
    with_storage(a.dtype, [&](auto storage) {
      with_vectors(std::max(a.head_size, a.value_size), [&](auto vectors) {
        using Storage = decltype(storage);
        using T = typename Storage::type;
        constexpr int kVectors = decltype(vectors)::value;
        constexpr int64_t most = std::max<int64_t>(1, kTileBytes / sizeof(Tile<kVectors>));
        AttentionScratch<kVectors> scratch;
        for (int64_t i = first; i < last;) {
          const int64_t row = i / a.kv_heads, first_kv = i % a.kv_heads, last_kv = std::min({a.kv_heads, first_kv + last - i, first_kv + most});
          const int64_t whole_rows = last_kv - first_kv == a.kv_heads ? (last - i) / a.kv_heads : 1;
          const int64_t rows = rows_of_a_prompt(a, row, std::min(kRowsTogether, whole_rows));
          const QueryRows<Storage> query{static_cast<const T*>(a.q) + row * a.q_stride, static_cast<T*>(a.out) + row * a.heads * a.value_size, nullptr, rows,
                                         a.q_stride, a.context_lens[row]};
          const int32_t* blocks = a.block_table + (row + rows - 1) * a.max_blocks;
          attend<Storage, kVectors>(shape, query, first_kv, last_kv, scratch, [&](int64_t from, int count, Tile<kVectors>* tiles) {
            load_tiles<Storage, kVectors>(a, shape, blocks, from, count, first_kv, last_kv, tiles);
          });
          i += rows * (last_kv - first_kv);
        }
      });
    });
  });
  return -1;
}

int64_t write_kv(const WriteKv& a) {
  const int64_t places = a.pages * a.page_size;
  for (int64_t i = 0; i < a.tokens; ++i)
    if (a.slots[i] >= places) return i;
  const auto copy = [&](const void* source, int64_t stride, void* target, int64_t bytes, int64_t page_bytes) {
    for (int64_t i = 0; i < a.tokens; ++i) {
      if (a.slots[i] < 0) continue;
      const int64_t place = a.slots[i] / a.page_size * page_bytes + a.slots[i] % a.page_size * bytes;
      std::memcpy(static_cast<char*>(target) + place, static_cast<const char*>(source) + i * stride, bytes);
    }
  };
  copy(a.k, a.k_stride_bytes, a.k_pages, a.k_row_bytes, a.k_page_bytes);
  copy(a.v, a.v_stride_bytes, a.v_pages, a.v_row_bytes, a.v_page_bytes);
  return -1;
}

}  // namespace fastppo::FASTPPO_ISA
