// Causal attention of packed sequences that may share prompts, forward and backward. Forward a token's bits are those that a decode step gives it.
#include "attention.h"

namespace fastppo::FASTPPO_ISA {
namespace {

constexpr int64_t kRowsTogether = 16;  // of a sequence's tokens for which a tile is loaded once

// A sequence's place in the packed tokens: its prompt's, where that stands apart and is shared, and its own, of which those from `query` on ask.
struct Places {
  int64_t prompt_first, prompt_last, first, last, query, query_row;
  FASTPPO_MEMBER int64_t prompt() const { return prompt_last - prompt_first; }
  FASTPPO_MEMBER int64_t queries() const { return last - query; }
  FASTPPO_MEMBER int64_t keys_of(int64_t i) const { return prompt() + query - first + i + 1; }  // that query number i sees, without a window
  FASTPPO_MEMBER int64_t row(int64_t position) const { return position < prompt() ? prompt_first + position : first + position - prompt(); }
};

FASTPPO_INLINE Places places(const PackedAttention& a, int64_t sequence) {
  const int64_t* p = a.sequences + 6 * sequence;
  return {p[0], p[1], p[2], p[3], p[4], p[5]};
}

FASTPPO_INLINE AttentionShape shape_of(const PackedAttention& a) {
  return {a.heads, a.kv_heads, static_cast<int>(a.head_size), static_cast<int>(a.head_size), a.scale, 0, a.window, nullptr};
}

template <int kVectors>
FASTPPO_INLINE void load_keys(
    const PackedAttention& a, const AttentionShape& shape, const Places& p, int64_t from, int count, int64_t first_kv, int64_t last_kv, Tile<kVectors>* tiles) {
  for (int key = 0; key < count; ++key) {
    const int64_t row = p.row(from + key);
    load_key<F32, kVectors>(shape, a.k + row * a.k_stride, a.v + row * a.v_stride, first_kv, last_kv, key, tiles);
  }
}

template <int kVectors>
FASTPPO_INLINE float dot(const vfloat* x, const vfloat* y) {
  vfloat product = x[0] * y[0];
  for (int i = 1; i < kVectors; ++i) product = fma(x[i], y[i], product);
  return sum_lanes(product);
}

template <int kVectors>
FASTPPO_INLINE void add_head(float* p, int size, const vfloat* x) {
  for (int i = 0; i * kLanes < size; ++i) {
    const int count = std::min(kLanes, size - i * kLanes);
    store(p + i * kLanes, count, load(p + i * kLanes, count) + x[i]);
  }
}

// Of one key head: a tile, what of it is read turned, and the gradients of its keys and values, which are made turned too.
template <int kVectors>
struct TileGradients {
  std::vector<Tile<kVectors>> tile{1};
  TileLines<kVectors> keys, values, d_keys, d_values;
};

// One query head of one token: q and the gradient of its output, its log-sum-exp, and do o.
template <int kVectors>
struct OutputGradient {
  vfloat query[kVectors], d_out[kVectors];
  float lse, delta;
  float* d_query;
};

// Query heads of a tile whose keys [first, last) they all see (arXiv:2205.14135, appendix B.4): p = exp(s - lse), ds = p (do v - do o) scale.
template <int kVectors, int kHeads>
FASTPPO_INLINE void add_gradients(const AttentionShape& shape, const OutputGradient<kVectors>* heads, int first, int last, TileGradients<kVectors>& tile) {
  const float *queries[kHeads], *d_outs[kHeads];
  for (int n = 0; n < kHeads; ++n) queries[n] = reinterpret_cast<const float*>(heads[n].query), d_outs[n] = reinterpret_cast<const float*>(heads[n].d_out);
  vfloat weights[kHeads], slopes[kHeads];
  multiply_lines<kVectors>(queries, tile.keys, weights);
  multiply_lines<kVectors>(d_outs, tile.values, slopes);
  const vint seen = (lane_numbers() >= first) & (lane_numbers() < last);
  float slope_of_key[kHeads][kTile];
  for (int n = 0; n < kHeads; ++n) {
    const vfloat above = weights[n] * shape.scale - heads[n].lse;
    const vfloat p = vexp_nonpositive(select(above > 0.0f, vfloat(0.0f), above));
    weights[n] = select(seen, p, vfloat(0.0f));
    slopes[n] = select(seen, p * (slopes[n] - heads[n].delta) * shape.scale, vfloat(0.0f));
    F32::store(slope_of_key[n], slopes[n]);
  }
  for (int i = 0; i < kVectors * kLanes; ++i) {
    vfloat d_key = tile.d_keys[i], d_value = tile.d_values[i];
#pragma GCC unroll 4
    for (int n = 0; n < kHeads; ++n) {
      d_key = fma(vfloat(queries[n][i]), slopes[n], d_key);
      d_value = fma(vfloat(d_outs[n][i]), weights[n], d_value);
    }
    tile.d_keys[i] = d_key, tile.d_values[i] = d_value;
  }
  constexpr int kAtOnce = std::min(kVectors, kHeads == 1 || kRegisterBytes == 64 ? 4 : 2);  // what fits into registers
  for (int column = 0; column < kVectors; column += kAtOnce) {
    vfloat d_query[kHeads][kAtOnce];
    for (int n = 0; n < kHeads; ++n)
      for (vfloat& part : d_query[n]) part = 0.0f;
    for (int key = first; key < last; ++key)
#pragma GCC unroll 4
      for (int n = 0; n < kHeads; ++n) {
        const vfloat slope = slope_of_key[n][key];
#pragma GCC unroll 4
        for (int i = 0; i < kAtOnce; ++i) d_query[n][i] = fma(slope, tile.tile[0].keys[key][column + i], d_query[n][i]);
      }
    for (int n = 0; n < kHeads; ++n) {
      const int size = std::min<int>(kAtOnce * kLanes, shape.head_size - column * kLanes);
      add_head<kAtOnce>(heads[n].d_query + column * kLanes, size, d_query[n]);
    }
  }
}

// Adds rows [0, count) of what was made turned to heads of `size` numbers, whose places are given.
template <int kVectors, class Place>
FASTPPO_INLINE void add_turned(const TileLines<kVectors>& lines, int count, int size, const Place& place) {
  TileRows<kVectors> rows;
  turn_back<kVectors>(lines, rows);
  for (int key = 0; key < count; ++key) add_head<kVectors>(place(key), size, rows[key]);
}

// Everything that the queries of one sequence give to and get from one key head. The gradients are added to.
template <int kVectors>
void differentiate(
    const PackedAttention& a, const PackedAttentionGradients& g, const AttentionShape& shape, const Places& p, int64_t kv, TileGradients<kVectors>& tile,
    std::vector<float>& deltas) {
  const int64_t group = a.heads / a.kv_heads, queries = p.queries(), size = a.head_size;
  // The query heads are [queries, group].
  const auto load_query_head = [&](int64_t n, OutputGradient<kVectors>& head) {
    const int64_t row = p.query_row + n / group, h = kv * group + n % group, number = row * a.heads + h;
    load_head<F32, kVectors>(a.q + row * a.q_stride + h * size, size, head.query);
    load_head<F32, kVectors>(g.d_out + number * size, size, head.d_out);
    head.lse = a.lse[number], head.delta = deltas[n], head.d_query = g.d_q + number * size;
    return a.out + number * size;
  };
  deltas.resize(queries * group);
  for (int64_t n = 0; n < queries * group; ++n) {
    OutputGradient<kVectors> head;
    vfloat out[kVectors];
    load_head<F32, kVectors>(load_query_head(n, head), size, out);
    deltas[n] = dot<kVectors>(out, head.d_out);
  }
  const int64_t keys = p.keys_of(queries - 1), first_seen = first_key(a.window, p.keys_of(0));
  for (int64_t begin = first_seen / kTile * kTile; begin < keys; begin += kTile) {
    const int64_t end = std::min(keys, begin + kTile);
    const int count = static_cast<int>(end - begin);
    Tile<kVectors>& rows = tile.tile[0];
    load_keys<kVectors>(a, shape, p, begin, count, kv, kv + 1, &rows);
    for (int key = count; key < kTile; ++key)
      for (int i = 0; i < kVectors; ++i) rows.keys[key][i] = rows.values[key][i] = 0.0f;
    turn<kVectors>(rows.keys, tile.keys);
    turn<kVectors>(rows.values, tile.values);
    for (int i = 0; i < kVectors * kLanes; ++i) tile.d_keys[i] = tile.d_values[i] = 0.0f;
    // Queries that see the same of its keys go together: one where the window begins or the sequence ends, and all between.
    const auto seen_by = [&](int64_t i) {
      const int64_t length = p.keys_of(i);
      return std::pair(std::max(begin, first_key(a.window, length)), std::min(end, length));
    };
    for (int64_t i = std::max<int64_t>(0, begin + 1 - p.keys_of(0)); i < queries;) {
      const auto [from, to] = seen_by(i);
      if (from >= end) break;
      int64_t next = i + 1;
      while (next < queries && seen_by(next) == std::pair(from, to)) ++next;
      for_heads<kHeadsInRegisters>((next - i) * group, [&, first = static_cast<int>(from - begin), last = static_cast<int>(to - begin)](auto number, int64_t n) {
        OutputGradient<kVectors> heads[number];
        for (int j = 0; j < number; ++j) load_query_head(i * group + n + j, heads[j]);
        add_gradients<kVectors, number>(shape, heads, first, last, tile);
      });
      i = next;
    }
    const auto place = [&](float* gradient) {
      return [&, gradient](int key) { return gradient + (p.row(begin + key) * a.kv_heads + kv) * size; };
    };
    add_turned<kVectors>(tile.d_keys, count, static_cast<int>(size), place(g.d_k));
    add_turned<kVectors>(tile.d_values, count, static_cast<int>(size), place(g.d_v));
  }
}

}  // namespace

void packed_attention(const PackedAttention& a, int threads) {
  const AttentionShape shape = shape_of(a);
  std::vector<std::pair<int64_t, int64_t>> pieces;  // (sequence, first of some of its queries)
  for (int64_t i = 0; i < a.count; ++i)
    for (int64_t query = 0; query < places(a, i).queries(); query += kRowsTogether) pieces.emplace_back(i, query);
  parallel_ranges(static_cast<int64_t>(pieces.size()), threads, 1, [&](int64_t first_piece, int64_t last_piece) {
    with_vectors(shape.head_size, [&](auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      AttentionScratch<kVectors> scratch;
      for (int64_t piece = first_piece; piece < last_piece; ++piece) {
        const auto [sequence, begin] = pieces[piece];
        const Places p = places(a, sequence);
        const int64_t end = std::min(begin + kRowsTogether, p.queries());
        const bool alone = a.window > 0 && p.keys_of(end - 1) > a.window;  // each query then begins with another key
        for (int64_t i = begin; i < end;) {
          const int64_t row = p.query_row + i, rows = alone ? 1 : end - i;
          const QueryRows<F32> query{a.q + row * a.q_stride, a.out + row * a.heads * a.head_size, a.lse + row * a.heads, rows, a.q_stride, p.keys_of(i)};
          attend<F32, kVectors>(shape, query, 0, a.kv_heads, scratch, [&](int64_t from, int count, Tile<kVectors>* tiles) {
            load_keys<kVectors>(a, shape, p, from, count, 0, a.kv_heads, tiles);
          });
          i += rows;
        }
      }
    });
  });
}

void packed_attention_backward(const PackedAttention& a, const PackedAttentionGradients& g, const int64_t* groups, int64_t count, int threads) {
  const AttentionShape shape = shape_of(a);
  parallel_ranges(count * a.kv_heads, threads, 1, [&](int64_t first, int64_t last) {
    with_vectors(shape.head_size, [&](auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      TileGradients<kVectors> tile;
      std::vector<float> deltas;
      for (int64_t i = first; i < last; ++i)
        for (int64_t sequence = groups[i / a.kv_heads]; sequence < groups[i / a.kv_heads + 1]; ++sequence)
          if (const Places p = places(a, sequence); p.queries() > 0) differentiate<kVectors>(a, g, shape, p, i % a.kv_heads, tile, deltas);
    });
  });
}

}  // namespace fastppo::FASTPPO_ISA
