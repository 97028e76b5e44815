// Attention of one new token a sequence over a paged key-value cache: online softmax over the keys, each key and value loaded once for all the
// query heads that share it. Rows may also be consecutive tokens of one prompt, whose keys are all in the cache: some of them share a load.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "online_softmax.h"
#include "parallel.h"

namespace fastppo::FASTPPO_ISA {
namespace {

constexpr int64_t kProductsWorthAThread = 1 << 17;  // about 10 microseconds, several times what it takes to wake a thread
constexpr int64_t kTileBytes = 1 << 17;  // of the key heads' tiles at a time, in L2
constexpr int kTile = 16;  // keys at once: their scores fill one vector, so that one exponential serves them all
constexpr int64_t kRowsTogether = 8;  // most rows of a prompt for which a tile is loaded once

// Elements [0, size) of a head as kVectors vectors; lanes beyond are 0.
template <class Storage, int kVectors>
FASTPPO_INLINE void load_head(const typename Storage::type* p, int size, vfloat* out) {
  if (size == kVectors * kLanes) {
    for (int i = 0; i < kVectors; ++i) F32::store(reinterpret_cast<float*>(out + i), Storage::load(p + i * kLanes));
    return;
  }
  for (int i = 0; i < kVectors; ++i) {
    const int rest = size - i * kLanes;
    out[i] = rest >= kLanes ? Storage::load(p + i * kLanes) : rest > 0 ? load_tail<Storage>(p + i * kLanes, rest, 0) : vfloat(0.0f);
  }
}

// Up to 16 consecutive keys and values of one key head.
template <int kVectors>
struct Tile {
  vfloat keys[kTile][kVectors], values[kTile][kVectors];
};

// A query head and what it has gathered: sum of p v over the keys so far, p = exp(score - max). `scores` are those of the current tile, then its p.
template <int kVectors>
struct QueryHead {
  vfloat query[kVectors], out[kVectors];
  float scores[kTile];
  float max, sum;
};

// A tile is gathered in three steps, each for all heads before the next: alone, a head's softmax would wait for every one of its own results.
template <int kVectors>
FASTPPO_INLINE void multiply_keys(QueryHead<kVectors>& head, const Tile<kVectors>& tile, int count) {
  for (int key = 0; key < kTile; key += 4) {
    vfloat product[4];
    for (int j = 0; j < 4; ++j) {
      product[j] = head.query[0] * tile.keys[key + j][0];
      for (int i = 1; i < kVectors; ++i) product[j] += head.query[i] * tile.keys[key + j][i];
    }
    const Quad four = sum_lanes_of_four(product);
    std::memcpy(head.scores + key, &four, sizeof four);
  }
  for (int key = count; key < kTile; ++key) head.scores[key] = -kInfinity;
}

template <int kVectors>
FASTPPO_INLINE void weigh_keys(QueryHead<kVectors>& head, const DecodeAttention& a) {
  vfloat scores = F32::load(head.scores);
  scores = select(scores == -kInfinity, scores, scores * a.scale);
  if (a.softcap > 0) scores = select(scores == -kInfinity, scores, a.softcap * vtanh(scores / a.softcap));
  const float top = max_lanes(scores);
  if (top > head.max) {
    const float factor = head.max == -kInfinity ? 0.0f : vexp_nonpositive(head.max - top)[0];
    head.sum *= factor;
    for (int i = 0; i < kVectors; ++i) head.out[i] *= factor;
    head.max = top;
  }
  const vfloat p = vexp_nonpositive(scores - (head.max == -kInfinity ? 0.0f : head.max));
  head.sum += sum_lanes(p);
  F32::store(head.scores, p);
}

template <int kVectors>
FASTPPO_INLINE void add_values(QueryHead<kVectors>& head, const Tile<kVectors>& tile, int count) {
  constexpr int kOutAtOnce = std::min(kVectors, 4);  // what fits into registers
  for (int first = 0; first < kVectors; first += kOutAtOnce) {
    vfloat out[kOutAtOnce];
    for (int i = 0; i < kOutAtOnce; ++i) out[i] = head.out[first + i];
    for (int key = 0; key < count; ++key) {
      const float weight = head.scores[key];
      for (int i = 0; i < kOutAtOnce; ++i) out[i] += weight * tile.values[key][first + i];
    }
    for (int i = 0; i < kOutAtOnce; ++i) head.out[first + i] = out[i];
  }
}

// Keys from .. from + count of key heads [first_kv, last_kv), which may lie in two pages, read in the order in which they lie: head by head, memory gives
// less than it can.
template <class Storage, int kVectors>
FASTPPO_INLINE void load_tiles(
    const DecodeAttention& a, const int32_t* blocks, int64_t from, int count, int64_t first_kv, int64_t last_kv, Tile<kVectors>* tiles) {
  using T = typename Storage::type;
  int64_t block = from / a.page_size, offset = from % a.page_size;
  for (int key = 0; key < count; ++key) {
    const T* k_row = static_cast<const T*>(a.k_pages) + blocks[block] * a.k_page_stride + offset * a.kv_heads * a.head_size;
    const T* v_row = static_cast<const T*>(a.v_pages) + blocks[block] * a.v_page_stride + offset * a.kv_heads * a.value_size;
    for (int64_t kv = first_kv; kv < last_kv; ++kv) load_head<Storage, kVectors>(k_row + kv * a.head_size, a.head_size, tiles[kv - first_kv].keys[key]);
    for (int64_t kv = first_kv; kv < last_kv; ++kv) load_head<Storage, kVectors>(v_row + kv * a.value_size, a.value_size, tiles[kv - first_kv].values[key]);
    if (++offset == a.page_size) ++block, offset = 0;
  }
  for (int64_t kv = 0; kv < last_kv - first_kv; ++kv)
    for (int key = count; key < kTile; ++key)
      for (vfloat& lane : tiles[kv].keys[key]) lane = 0.0f;
}

// The first key that is seen.
int64_t first_key(const DecodeAttention& a, int64_t length) { return a.window > 0 && length > a.window ? length - a.window : 0; }

// How many rows from `row` on are consecutive tokens of one prompt, which see the same keys but for their own: at most `most`.
int64_t rows_of_a_prompt(const DecodeAttention& a, int64_t row, int64_t most) {
  int64_t rows = 1;
  for (; rows < most; ++rows) {
    const int64_t length = a.context_lens[row] + rows, blocks = (length + a.page_size - 1) / a.page_size;
    const int32_t *table = a.block_table + row * a.max_blocks, *next = table + rows * a.max_blocks;
    if (a.context_lens[row + rows] != length || first_key(a, length) > 0 || !std::equal(table, table + blocks, next)) break;
  }
  return rows;
}

// Rows [first_row, first_row + rows) of one sequence: key heads [first_kv, last_kv), and the query heads that share them.
template <class Storage, int kVectors>
void attend(
    const DecodeAttention& a, int64_t first_row, int64_t rows, int64_t first_kv, int64_t last_kv, std::vector<QueryHead<kVectors>>& heads,
    std::vector<Tile<kVectors>>& tiles) {
  using T = typename Storage::type;
  const int64_t group = a.heads / a.kv_heads, first_head = first_kv * group, count = (last_kv - first_kv) * group;
  const int64_t longest = a.context_lens[first_row + rows - 1], first = first_key(a, longest);
  const int32_t* blocks = a.block_table + (first_row + rows - 1) * a.max_blocks;
  heads.resize(rows * count);
  for (int64_t row = 0; row < rows; ++row) {
    const T* q = static_cast<const T*>(a.q) + (first_row + row) * a.q_stride + first_head * a.head_size;
    for (int64_t h = 0; h < count; ++h) {
      QueryHead<kVectors>& head = heads[row * count + h];
      load_head<Storage, kVectors>(q + h * a.head_size, a.head_size, head.query);
      for (vfloat& out : head.out) out = 0.0f;
      head.max = a.sinks ? a.sinks[first_head + h] : -kInfinity;  // a sink is a key whose value is 0
      head.sum = a.sinks ? 1.0f : 0.0f;
    }
  }
  // Tiles begin at multiples of 16 from the sequence's start: neither the batch nor the page size nor the window changes their sums' order.
  tiles.resize(last_kv - first_kv);
  for (int64_t begin = first / kTile * kTile; begin < longest; begin += kTile) {
    const int64_t from = std::max(first, begin), to = std::min(begin + kTile, longest);
    load_tiles<Storage>(a, blocks, from, static_cast<int>(to - from), first_kv, last_kv, tiles.data());
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t seen = std::min<int64_t>(to, a.context_lens[first_row + row]) - from;
      if (seen <= 0) continue;
      QueryHead<kVectors>* row_heads = heads.data() + row * count;
      for (int64_t h = 0; h < count; ++h) multiply_keys(row_heads[h], tiles[h / group], static_cast<int>(seen));
      for (int64_t h = 0; h < count; ++h) weigh_keys(row_heads[h], a);
      for (int64_t h = 0; h < count; ++h) add_values(row_heads[h], tiles[h / group], static_cast<int>(seen));
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    T* out = static_cast<T*>(a.out) + ((first_row + row) * a.heads + first_head) * a.value_size;
    const bool sees_nothing = a.context_lens[first_row + row] == 0;
    for (int64_t h = 0; h < count; ++h, out += a.value_size) {
      const QueryHead<kVectors>& head = heads[row * count + h];
      for (int i = 0; i * kLanes < a.value_size; ++i) {
        const int rest = a.value_size - i * kLanes;
        const vfloat result = sees_nothing ? vfloat(0.0f) : head.out[i] / head.sum;
        if (rest >= kLanes) Storage::store(out + i * kLanes, result);
        else store_tail<Storage>(out + i * kLanes, rest, result);
      }
    }
  }
}

// Calls body(kVectors) with the vectors of the larger head, rounded up: sizes that are known when this is compiled stay in registers.
template <class Body>
FASTPPO_INLINE void with_vectors(const DecodeAttention& a, const Body& body) {
  const int size = a.head_size > a.value_size ? a.head_size : a.value_size;
  if (size <= kLanes) body(std::integral_constant<int, 1>{});
  else if (size <= 2 * kLanes) body(std::integral_constant<int, 2>{});
  else if (size <= 4 * kLanes) body(std::integral_constant<int, 4>{});
  else if (size <= 8 * kLanes) body(std::integral_constant<int, 8>{});
  else body(std::integral_constant<int, kMaxHeadSize / kLanes>{});
}

int64_t first_bad_sequence(const DecodeAttention& a) {
  for (int64_t i = 0; i < a.batch; ++i) {
    if (a.context_lens[i] < 0 || a.context_lens[i] > a.max_blocks * a.page_size) return i;
    for (int64_t block = first_key(a, a.context_lens[i]) / a.page_size; block * a.page_size < a.context_lens[i]; ++block) {
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
  const int64_t group = a.heads / a.kv_heads;
  int64_t keys = 0;
  for (int64_t i = 0; i < a.batch; ++i) keys += a.context_lens[i] - first_key(a, a.context_lens[i]);
  const int64_t products = a.batch ? keys * group * (a.head_size + a.value_size) / a.batch + 1 : 1;  // of a sequence's key head, on average
  parallel_ranges(a.batch * a.kv_heads, threads, (kProductsWorthAThread + products - 1) / products, [&](int64_t first, int64_t last) {
    with_storage(a.dtype, [&](auto storage) {
      with_vectors(a, [&](auto vectors) {
        constexpr int64_t most = std::max<int64_t>(1, kTileBytes / sizeof(Tile<decltype(vectors)::value>));
        std::vector<QueryHead<decltype(vectors)::value>> heads;
        std::vector<Tile<decltype(vectors)::value>> tiles;
        for (int64_t i = first; i < last;) {
          const int64_t row = i / a.kv_heads, first_kv = i % a.kv_heads, last_kv = std::min({a.kv_heads, first_kv + last - i, first_kv + most});
          const int64_t whole_rows = last_kv - first_kv == a.kv_heads ? (last - i) / a.kv_heads : 1;
          const int64_t rows = rows_of_a_prompt(a, row, std::min(kRowsTogether, whole_rows));
          attend<decltype(storage), decltype(vectors)::value>(a, row, rows, first_kv, last_kv, heads, tiles);
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
