// Attention by online softmax over tiles of 16 keys (arXiv:1805.02867; arXiv:2205.14135, algorithm 1), a query head at a time: what decoding over a paged
// cache and packed sequences share, so that a token has the same bits in both.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "online_softmax.h"
#include "parallel.h"

namespace fastppo::FASTPPO_ISA {
namespace {

constexpr int kTile = 16;  // keys at once: their scores fill one vector, so that one exponential serves them all

struct AttentionShape {
  int64_t heads, kv_heads;
  int head_size, value_size;
  float scale, softcap;
  int64_t window;      // 0: off
  const float* sinks;  // [heads] or null
};

// The first key that the last of `length` tokens sees.
FASTPPO_INLINE int64_t first_key(int64_t window, int64_t length) { return window > 0 && length > window ? length - window : 0; }

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
      for (int i = 1; i < kVectors; ++i) product[j] = fma(head.query[i], tile.keys[key + j][i], product[j]);
    }
    const Quad four = sum_lanes_of_four(product);
    std::memcpy(head.scores + key, &four, sizeof four);
  }
  for (int key = count; key < kTile; ++key) head.scores[key] = -kInfinity;
}

template <int kVectors>
FASTPPO_INLINE void weigh_keys(QueryHead<kVectors>& head, const AttentionShape& a) {
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
      const vfloat weight = head.scores[key];
      for (int i = 0; i < kOutAtOnce; ++i) out[i] = fma(weight, tile.values[key][first + i], out[i]);
    }
    for (int i = 0; i < kOutAtOnce; ++i) head.out[first + i] = out[i];
  }
}

// Row `from` of a tile's keys or values, whose heads lie side by side.
template <class Storage, int kVectors>
FASTPPO_INLINE void load_key(
    const AttentionShape& a, const typename Storage::type* k, const typename Storage::type* v, int64_t first_kv, int64_t last_kv, int key,
    Tile<kVectors>* tiles) {
  for (int64_t kv = first_kv; kv < last_kv; ++kv) load_head<Storage, kVectors>(k + kv * a.head_size, a.head_size, tiles[kv - first_kv].keys[key]);
  for (int64_t kv = first_kv; kv < last_kv; ++kv) load_head<Storage, kVectors>(v + kv * a.value_size, a.value_size, tiles[kv - first_kv].values[key]);
}

// The keys beyond `count` of every tile become 0.
template <int kVectors>
FASTPPO_INLINE void clear_keys(int count, std::vector<Tile<kVectors>>& tiles) {
  for (Tile<kVectors>& tile : tiles)
    for (int key = count; key < kTile; ++key)
      for (vfloat& lane : tile.keys[key]) lane = 0.0f;
}

// What a thread works with.
template <int kVectors>
struct AttentionScratch {
  std::vector<QueryHead<kVectors>> heads;
  std::vector<Tile<kVectors>> tiles;
};

// Rows of one sequence: consecutive tokens of which the first sees `length` keys, or fewer in a window, and each of the others one more.
template <class Storage>
struct QueryRows {
  const typename Storage::type* q;
  typename Storage::type* out;  // [rows, heads, value_size]
  float* lse;                   // [rows, heads] log-sum-exps of the scores, or null
  int64_t rows, q_stride, length;
};

// Key heads [first_kv, last_kv) and the query heads that share them. load(from, count, tiles) fills the tiles of these key heads with keys and values
// from .. from + count.
template <class Storage, int kVectors, class Load>
void attend(
    const AttentionShape& a, const QueryRows<Storage>& query, int64_t first_kv, int64_t last_kv, AttentionScratch<kVectors>& scratch, const Load& load) {
  using T = typename Storage::type;
  auto& [heads, tiles] = scratch;
  const int64_t group = a.heads / a.kv_heads, first_head = first_kv * group, count = (last_kv - first_kv) * group;
  const int64_t longest = query.length + query.rows - 1, first = first_key(a.window, longest);
  heads.resize(query.rows * count);
  for (int64_t row = 0; row < query.rows; ++row) {
    const T* q = query.q + row * query.q_stride + first_head * a.head_size;
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
    load(from, static_cast<int>(to - from), tiles.data());
    clear_keys(static_cast<int>(to - from), tiles);
    for (int64_t row = 0; row < query.rows; ++row) {
      const int64_t seen = std::min(to, query.length + row) - from;
      if (seen <= 0) continue;
      QueryHead<kVectors>* row_heads = heads.data() + row * count;
      for (int64_t h = 0; h < count; ++h) multiply_keys(row_heads[h], tiles[h / group], static_cast<int>(seen));
      for (int64_t h = 0; h < count; ++h) weigh_keys(row_heads[h], a);
      for (int64_t h = 0; h < count; ++h) add_values(row_heads[h], tiles[h / group], static_cast<int>(seen));
    }
  }
  for (int64_t row = 0; row < query.rows; ++row) {
    T* out = query.out + (row * a.heads + first_head) * a.value_size;
    const bool sees_nothing = query.length + row == 0;
    for (int64_t h = 0; h < count; ++h, out += a.value_size) {
      const QueryHead<kVectors>& head = heads[row * count + h];
      if (query.lse) query.lse[row * a.heads + first_head + h] = head.max + std::log(head.sum);
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
FASTPPO_INLINE void with_vectors(int size, const Body& body) {
  if (size <= kLanes) body(std::integral_constant<int, 1>{});
  else if (size <= 2 * kLanes) body(std::integral_constant<int, 2>{});
  else if (size <= 4 * kLanes) body(std::integral_constant<int, 4>{});
  else if (size <= 8 * kLanes) body(std::integral_constant<int, 8>{});
  else body(std::integral_constant<int, kMaxHeadSize / kLanes>{});
}

}  // namespace
}  // namespace fastppo::FASTPPO_ISA
