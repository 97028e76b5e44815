// Attention by online softmax over tiles of 16 keys (arXiv:1805.02867; arXiv:2205.14135, algorithm 1), a query head at a time: what decoding over a paged
// cache and packed sequences share, so that a token has the same bits in both.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "online_softmax.h"
#include "parallel.h"

namespace fastppo::FASTPPO_ISA {
namespace {

constexpr int kTile = 16;  // keys at once: their scores fill one vector, so that one exponential serves them all
constexpr int kHeadsTogether = 4;  // query heads that share what is done once for all
constexpr int kHeadsInRegisters = kRegisterBytes == 64 ? 4 : 2;  // those whose sums stay in registers beside a key's
// Query heads of a key head from which on turning its tile costs less than it saves; with half as many registers it never does, but for gradients.
constexpr int kTurnedFor = kRegisterBytes == 64 ? 4 : std::numeric_limits<int>::max();
static_assert(kTile == kLanes);

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

// The keys or values of a tile, and the same turned: line i holds element i of each.
template <int kVectors>
using TileRows = vfloat[kTile][kVectors];
template <int kVectors>
using TileLines = vfloat[kVectors * kLanes];

// Up to 16 consecutive keys and values of one key head.
template <int kVectors>
struct Tile {
  TileRows<kVectors> keys, values;
};

template <int kVectors>
FASTPPO_INLINE void turn(const TileRows<kVectors>& rows, TileLines<kVectors>& lines) {
  transpose(reinterpret_cast<const float*>(rows), kTile, kVectors * kLanes, reinterpret_cast<float*>(lines));
}

template <int kVectors>
FASTPPO_INLINE void turn_back(const TileLines<kVectors>& lines, TileRows<kVectors>& rows) {
  transpose(reinterpret_cast<const float*>(lines), kVectors * kLanes, kTile, reinterpret_cast<float*>(rows));
}

// out[n] = x[n] times each of the sixteen rows that were turned. A sum has the order of sum_lanes over vectors, so the bits that it has unturned.
template <int kVectors, int kHeads>
FASTPPO_INLINE void multiply_lines(const float* const (&x)[kHeads], const TileLines<kVectors>& lines, vfloat (&out)[kHeads]) {
  vfloat quads[4][kHeads];
#pragma GCC unroll 1  // or GCC would make more at once than there are registers
  for (int j = 0; j < 4; ++j) {
    vfloat halves[2][kHeads];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      vfloat lanes[2][kHeads];
#pragma GCC unroll 2
      for (int side = 0; side < 2; ++side)
#pragma GCC unroll 16
        for (int i = 0; i < kVectors; ++i) {
          const int place = i * kLanes + 8 * side + 4 * half + j;
#pragma GCC unroll 4
          for (int n = 0; n < kHeads; ++n)
            lanes[side][n] = i == 0 ? x[n][place] * lines[place] : fma(vfloat(x[n][place]), lines[place], lanes[side][n]);
        }
#pragma GCC unroll 4
      for (int n = 0; n < kHeads; ++n) halves[half][n] = lanes[0][n] + lanes[1][n];
    }
#pragma GCC unroll 4
    for (int n = 0; n < kHeads; ++n) quads[j][n] = halves[0][n] + halves[1][n];
  }
#pragma GCC unroll 4
  for (int n = 0; n < kHeads; ++n) out[n] = (quads[0][n] + quads[2][n]) + (quads[1][n] + quads[3][n]);
}

// A query head and what it has gathered: sum of p v over the keys so far, p = exp(score - max). `scores` are those of the current tile, then its p.
template <int kVectors>
struct QueryHead {
  vfloat query[kVectors], out[kVectors];
  float scores[kTile];
  float max, sum;
};

// A tile is gathered in three steps, each for all heads before the next: alone, a head's softmax would wait for every one of its own results.
template <int kVectors>
FASTPPO_INLINE void multiply_keys(QueryHead<kVectors>& head, const Tile<kVectors>& tile) {
  for (int key = 0; key < kTile; key += 4) {
    vfloat product[4];
    for (int j = 0; j < 4; ++j) {
      product[j] = head.query[0] * tile.keys[key + j][0];
      for (int i = 1; i < kVectors; ++i) product[j] = fma(head.query[i], tile.keys[key + j][i], product[j]);
    }
    const Quad four = sum_lanes_of_four(product);
    std::memcpy(head.scores + key, &four, sizeof four);
  }
}

template <int kVectors, int kHeads>
FASTPPO_INLINE void multiply_turned_keys(QueryHead<kVectors>* heads, const TileLines<kVectors>& lines) {
  const float* queries[kHeads];
  vfloat scores[kHeads];
  for (int n = 0; n < kHeads; ++n) queries[n] = reinterpret_cast<const float*>(heads[n].query);
  multiply_lines<kVectors>(queries, lines, scores);
  for (int n = 0; n < kHeads; ++n) F32::store(heads[n].scores, scores[n]);
}

// One number for each of the vectors, by the function of four where there are four.
template <int kHeads, class One, class Four>
FASTPPO_INLINE void fold_lanes(const vfloat (&v)[kHeads], float (&out)[kHeads], const One& one, const Four& four) {
  if constexpr (kHeads == 4) {
    const Quad folded = four(v);
    std::memcpy(out, &folded, sizeof folded);
  } else {
    for (int n = 0; n < kHeads; ++n) out[n] = one(v[n]);
  }
}

// The scores of the first `count` keys become weights.
template <int kVectors, int kHeads>
FASTPPO_INLINE void weigh_keys(QueryHead<kVectors>* heads, int count, const AttentionShape& a) {
  vfloat scores[kHeads];
  float tops[kHeads], sums[kHeads];
  for (int n = 0; n < kHeads; ++n) {
    scores[n] = F32::load(heads[n].scores) * a.scale;
    if (a.softcap > 0) scores[n] = a.softcap * vtanh(scores[n] / a.softcap);
    if (count < kTile) scores[n] = select(lane_numbers() < count, scores[n], vfloat(-kInfinity));
  }
  fold_lanes(scores, tops, max_lanes, max_lanes_of_four);
  for (int n = 0; n < kHeads; ++n) {
    QueryHead<kVectors>& head = heads[n];
    if (tops[n] > head.max) {
      const float factor = head.max == -kInfinity ? 0.0f : vexp_nonpositive(head.max - tops[n])[0];
      head.sum *= factor;
      for (int i = 0; i < kVectors; ++i) head.out[i] *= factor;
      head.max = tops[n];
    }
  }
  for (int n = 0; n < kHeads; ++n) {
    scores[n] = vexp_nonpositive(scores[n] - (heads[n].max == -kInfinity ? 0.0f : heads[n].max));
    F32::store(heads[n].scores, scores[n]);
  }
  fold_lanes(scores, sums, sum_lanes, sum_lanes_of_four);
  for (int n = 0; n < kHeads; ++n) heads[n].sum += sums[n];
}

template <int kVectors, int kHeads>
FASTPPO_INLINE void add_values(QueryHead<kVectors>* heads, const Tile<kVectors>& tile, int count) {
  constexpr int kOutAtOnce = std::min(kVectors, kHeads == 1 || kRegisterBytes == 64 ? 4 : 2);  // what fits into registers
  for (int first = 0; first < kVectors; first += kOutAtOnce) {
    vfloat out[kHeads][kOutAtOnce];
    for (int n = 0; n < kHeads; ++n)
      for (int i = 0; i < kOutAtOnce; ++i) out[n][i] = heads[n].out[first + i];
    for (int key = 0; key < count; ++key) {
#pragma GCC unroll 4
      for (int n = 0; n < kHeads; ++n) {
        const vfloat weight = heads[n].scores[key];
#pragma GCC unroll 4
        for (int i = 0; i < kOutAtOnce; ++i) out[n][i] = fma(weight, tile.values[key][first + i], out[n][i]);
      }
    }
    for (int n = 0; n < kHeads; ++n)
      for (int i = 0; i < kOutAtOnce; ++i) heads[n].out[first + i] = out[n][i];
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
  TileLines<kVectors> turned;
};

// Calls body(number, first) for first = 0 .. count by `number`s: kTogether, then one by one.
template <int kTogether, class Body>
FASTPPO_INLINE void for_heads(int64_t count, const Body& body) {
  int64_t first = 0;
  for (; first + kTogether <= count; first += kTogether) body(std::integral_constant<int, kTogether>{}, first);
  for (; first < count; ++first) body(std::integral_constant<int, 1>{}, first);
}

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
  auto& [heads, tiles, turned] = scratch;
  const int64_t group = a.heads / a.kv_heads, first_head = first_kv * group, kv_heads = last_kv - first_kv;
  const int64_t longest = query.length + query.rows - 1, first = first_key(a.window, longest);
  const bool turns = query.rows * group >= kTurnedFor;
  // [kv_heads, rows, group]: those that a tile serves lie together.
  heads.resize(kv_heads * query.rows * group);
  const auto for_each_head = [&](const auto& body) {
    QueryHead<kVectors>* head = heads.data();
    for (int64_t kv = 0; kv < kv_heads; ++kv)
      for (int64_t row = 0; row < query.rows; ++row)
        for (int64_t h = first_head + kv * group; h < first_head + (kv + 1) * group; ++h) body(*head++, row, h);
  };
  for_each_head([&](QueryHead<kVectors>& head, int64_t row, int64_t h) {
    load_head<Storage, kVectors>(query.q + row * query.q_stride + h * a.head_size, a.head_size, head.query);
    for (vfloat& out : head.out) out = 0.0f;
    head.max = a.sinks ? a.sinks[h] : -kInfinity;  // a sink is a key whose value is 0
    head.sum = a.sinks ? 1.0f : 0.0f;
  });
  // Tiles begin at multiples of 16 from the sequence's start: neither the batch nor the page size nor the window changes their sums' order.
  tiles.resize(kv_heads);
  for (int64_t begin = first / kTile * kTile; begin < longest; begin += kTile) {
    const int64_t from = std::max(first, begin), to = std::min(begin + kTile, longest);
    load(from, static_cast<int>(to - from), tiles.data());
    clear_keys(static_cast<int>(to - from), tiles);
    // Rows see the tile from `first_row` on, and all of it from `whole` on.
    const int64_t first_row = std::max<int64_t>(0, from + 1 - query.length), whole = std::clamp<int64_t>(to - query.length, 0, query.rows);
    const auto seen = [&](int64_t row) { return static_cast<int>(std::min(to, query.length + row) - from); };
    const auto head_of = [&](int64_t kv, int64_t row) { return heads.data() + (kv * query.rows + row) * group; };
    for (int64_t kv = 0; kv < kv_heads; ++kv) {
      QueryHead<kVectors>* own = head_of(kv, first_row);
      const int64_t count = (query.rows - first_row) * group;
      if (turns) turn<kVectors>(tiles[kv].keys, turned);
      if (turns) for_heads<kHeadsInRegisters>(count, [&](auto number, int64_t n) { multiply_turned_keys<kVectors, number>(own + n, turned); });
      else for (int64_t n = 0; n < count; ++n) multiply_keys(own[n], tiles[kv]);
    }
    const auto weigh = [&](QueryHead<kVectors>* first_of, int64_t number_of, int count) {
      for_heads<kHeadsTogether>(number_of, [&](auto number, int64_t n) { weigh_keys<kVectors, number>(first_of + n, count, a); });
    };
    if (first_row == 0 && whole == 0) {  // all heads see the same: a decode step's
      weigh(heads.data(), static_cast<int64_t>(heads.size()), seen(0));
    } else {
      for (int64_t kv = 0; kv < kv_heads; ++kv) {
        for (int64_t row = first_row; row < whole; ++row) weigh(head_of(kv, row), group, seen(row));
        weigh(head_of(kv, whole), (query.rows - whole) * group, static_cast<int>(to - from));
      }
    }
    for (int64_t kv = 0; kv < kv_heads; ++kv) {
      const auto add = [&](int64_t row, int64_t rows) {
        for_heads<kHeadsInRegisters>(rows * group, [&](auto number, int64_t n) { add_values<kVectors, number>(head_of(kv, row) + n, tiles[kv], seen(row)); });
      };
      for (int64_t row = first_row; row < whole; ++row) add(row, 1);
      add(whole, query.rows - whole);
    }
  }
  for_each_head([&](const QueryHead<kVectors>& head, int64_t row, int64_t h) {
    const bool sees_nothing = query.length + row == 0;
    if (query.lse) query.lse[row * a.heads + h] = head.max + std::log(head.sum);
    T* out = query.out + (row * a.heads + h) * a.value_size;
    for (int i = 0; i * kLanes < a.value_size; ++i) {
      const int rest = a.value_size - i * kLanes;
      const vfloat result = sees_nothing ? vfloat(0.0f) : head.out[i] / head.sum;
      if (rest >= kLanes) Storage::store(out + i * kLanes, result);
      else store_tail<Storage>(out + i * kLanes, rest, result);
    }
  });
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
