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

// Of one key head and the query heads that share it, for the tokens of a sequence: the gradients that a tile of keys gets and gives.
template <int kVectors>
struct TileGradients {
  vfloat keys[kTile][kVectors], values[kTile][kVectors];
};

template <int kVectors>
FASTPPO_INLINE float dot(const vfloat* x, const vfloat* y) {
  vfloat product = x[0] * y[0];
  for (int i = 1; i < kVectors; ++i) product = fma(x[i], y[i], product);
  return sum_lanes(product);
}

// x y_j for the tile's sixteen rows y_j.
template <int kVectors>
FASTPPO_INLINE vfloat dot_tile(const vfloat* x, const vfloat (&y)[kTile][kVectors]) {
  float found[kTile];
  for (int key = 0; key < kTile; key += 4) {
    vfloat product[4];
    for (int j = 0; j < 4; ++j) {
      product[j] = x[0] * y[key + j][0];
      for (int i = 1; i < kVectors; ++i) product[j] = fma(x[i], y[key + j][i], product[j]);
    }
    const Quad four = sum_lanes_of_four(product);
    std::memcpy(found + key, &four, sizeof four);
  }
  return F32::load(found);
}

template <int kVectors>
FASTPPO_INLINE void add_head(float* p, int size, const vfloat* x) {
  for (int i = 0; i * kLanes < size; ++i) {
    const int count = std::min(kLanes, size - i * kLanes);
    store(p + i * kLanes, count, load(p + i * kLanes, count) + x[i]);
  }
}

// One query head of one token against the keys [first, last) of a tile (arXiv:2205.14135, appendix B.4): p = exp(s - lse), ds = p (do v - do o) scale.
template <int kVectors>
FASTPPO_INLINE void add_gradients(
    const AttentionShape& shape, const Tile<kVectors>& tile, const vfloat* query, const vfloat* d_out, float lse, float delta, int first, int last,
    float* d_query, TileGradients<kVectors>& gradients) {
  const vfloat above = dot_tile<kVectors>(query, tile.keys) * shape.scale - lse;
  const vfloat p = vexp_nonpositive(select(above > 0.0f, vfloat(0.0f), above));
  float weights[kTile], slopes[kTile];
  F32::store(weights, p);
  F32::store(slopes, p * (dot_tile<kVectors>(d_out, tile.values) - delta) * shape.scale);
  vfloat sum[kVectors];
  for (vfloat& part : sum) part = 0.0f;
  for (int key = first; key < last; ++key) {
    const vfloat weight = weights[key], slope = slopes[key];
    for (int i = 0; i < kVectors; ++i) {
      sum[i] = fma(slope, tile.keys[key][i], sum[i]);
      gradients.keys[key][i] = fma(slope, query[i], gradients.keys[key][i]);
      gradients.values[key][i] = fma(weight, d_out[i], gradients.values[key][i]);
    }
  }
  add_head<kVectors>(d_query, shape.head_size, sum);
}

// Everything that the queries of one sequence give to and get from one key head. The gradients are added to.
template <int kVectors>
void differentiate(const PackedAttention& a, const PackedAttentionGradients& g, const AttentionShape& shape, const Places& p, int64_t kv, std::vector<float>& deltas) {
  const int64_t group = a.heads / a.kv_heads, queries = p.queries(), size = a.head_size;
  const auto place = [&](int64_t i, int64_t head) { return ((p.query_row + i) * a.heads + head) * size; };
  deltas.resize(queries * group);
  for (int64_t i = 0; i < queries; ++i)
    for (int64_t h = 0; h < group; ++h) {
      vfloat out[kVectors], d_out[kVectors];
      load_head<F32, kVectors>(a.out + place(i, kv * group + h), size, out);
      load_head<F32, kVectors>(g.d_out + place(i, kv * group + h), size, d_out);
      deltas[i * group + h] = dot<kVectors>(out, d_out);
    }
  std::vector<Tile<kVectors>> tiles(1);
  TileGradients<kVectors> gradients;
  const int64_t keys = p.keys_of(queries - 1), first_seen = first_key(a.window, p.keys_of(0));
  for (int64_t begin = first_seen / kTile * kTile; begin < keys; begin += kTile) {
    const int count = static_cast<int>(std::min<int64_t>(kTile, keys - begin));
    load_keys<kVectors>(a, shape, p, begin, count, kv, kv + 1, tiles.data());
    clear_keys(count, tiles);
    for (int key = count; key < kTile; ++key)
      for (vfloat& lane : tiles[0].values[key]) lane = 0.0f;
    for (int key = 0; key < kTile; ++key)
      for (int i = 0; i < kVectors; ++i) gradients.keys[key][i] = gradients.values[key][i] = 0.0f;
    for (int64_t i = std::max<int64_t>(0, begin + 1 - p.keys_of(0)); i < queries; ++i) {
      const int64_t length = p.keys_of(i), from = first_key(a.window, length);
      if (from >= begin + kTile) break;
      const int first = static_cast<int>(std::max<int64_t>(0, from - begin)), last = static_cast<int>(std::min<int64_t>(kTile, length - begin));
      for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
        vfloat query[kVectors], d_out[kVectors];
        load_head<F32, kVectors>(a.q + (p.query_row + i) * a.q_stride + h * size, size, query);
        load_head<F32, kVectors>(g.d_out + place(i, h), size, d_out);
        add_gradients<kVectors>(shape, tiles[0], query, d_out, a.lse[(p.query_row + i) * a.heads + h], deltas[i * group + h - kv * group], first, last,
                                g.d_q + place(i, h), gradients);
      }
    }
    for (int key = 0; key < count; ++key) {
      const int64_t at = (p.row(begin + key) * a.kv_heads + kv) * size;
      add_head<kVectors>(g.d_k + at, size, gradients.keys[key]);
      add_head<kVectors>(g.d_v + at, size, gradients.values[key]);
    }
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
      std::vector<float> deltas;
      for (int64_t i = first; i < last; ++i)
        for (int64_t sequence = groups[i / a.kv_heads]; sequence < groups[i / a.kv_heads + 1]; ++sequence)
          if (const Places p = places(a, sequence); p.queries() > 0) differentiate<decltype(vectors)::value>(a, g, shape, p, i % a.kv_heads, deltas);
    });
  });
}

}  // namespace fastppo::FASTPPO_ISA
