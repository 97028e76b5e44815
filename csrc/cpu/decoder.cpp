// One decode step of a Llama-like decoder in fp32: everything between the last tokens and the hidden states that the head reads, in one call. Rows are
// independent of each other, so a row's bits do not depend on the batch. All rows write their keys before any attends: they may be tokens of one prompt.
#include "layer_rows.h"

namespace fastppo::FASTPPO_ISA {
namespace {

// The scratch of one step, [rows, ...] each.
struct Buffers {
  float *x, *normed, *q, *k, *v, *attended, *update, *gate, *up;
};

Buffers carve(const Decoder& d, float* scratch) {
  const auto take = [&](int64_t width) {
    float* begin = scratch;
    scratch += d.rows * width;
    return begin;
  };
  const int64_t q_width = d.heads * d.head_size, kv_width = d.kv_heads * d.head_size;
  return {d.hidden, take(d.hidden_size), take(q_width), take(kv_width), take(kv_width), take(q_width), take(d.hidden_size), take(d.inner_size),
          take(d.inner_size)};
}

void linear(const Decoder& d, const float* x, int64_t inner, const LinearWeights& w, float* out, int threads) {
  matmul({x, w.weight, w.bias, out, kFloat32, d.rows, w.columns, inner, inner, 1, 1, w.stride, w.columns, false}, threads);
}

// Heads [rows, heads, head_size] after the optional norm over each head, rotated to their positions.
void place_heads(const Decoder& d, const NormWeights& norm, int64_t heads, int64_t row, float* x) {
  const int64_t position = d.lengths[row] - 1;
  for (int64_t h = 0; h < heads; ++h) {
    float* head = x + (row * heads + h) * d.head_size;
    if (norm.weight) normalize(head, norm.weight, norm.eps, d.head_size, head);
    rotate(head, d.cos + position * d.rotary_size, d.sin + position * d.rotary_size, d.rotary_size, head);
  }
}

void attend(const Decoder& d, const DecoderLayer& layer, const Buffers& b, int threads) {
  const int64_t q_width = d.heads * d.head_size, kv_width = d.kv_heads * d.head_size, page = d.page_size * kv_width;
  linear(d, b.normed, d.hidden_size, layer.q, b.q, threads);
  linear(d, b.normed, d.hidden_size, layer.k, b.k, threads);
  linear(d, b.normed, d.hidden_size, layer.v, b.v, threads);
  parallel_ranges(d.rows, threads, rows_worth_a_thread(q_width), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      place_heads(d, layer.q_norm, d.heads, row, b.q);
      place_heads(d, layer.k_norm, d.kv_heads, row, b.k);
      const int64_t position = d.lengths[row] - 1;
      const int64_t place = d.block_table[row * d.table_stride + position / d.page_size] * page + position % d.page_size * kv_width;
      std::memcpy(layer.k_pages + place, b.k + row * kv_width, kv_width * sizeof(float));
      std::memcpy(layer.v_pages + place, b.v + row * kv_width, kv_width * sizeof(float));
    }
  });
  DecodeAttention attention{b.q, layer.k_pages, layer.v_pages, d.block_table, d.context_lens, nullptr, b.attended, kFloat32};
  attention.batch = d.rows, attention.heads = d.heads, attention.kv_heads = d.kv_heads, attention.pages = d.pages, attention.page_size = d.page_size;
  attention.max_blocks = d.table_stride, attention.q_stride = q_width, attention.k_page_stride = attention.v_page_stride = page;
  attention.head_size = attention.value_size = static_cast<int>(d.head_size);
  attention.scale = layer.scale, attention.softcap = 0, attention.window = layer.window;
  decode_attention(attention, threads);
  linear(d, b.attended, q_width, layer.o, b.update, threads);
}

void feed_forward(const Decoder& d, const DecoderLayer& layer, const Buffers& b, int threads) {
  linear(d, b.normed, d.hidden_size, layer.gate, b.gate, threads);
  linear(d, b.normed, d.hidden_size, layer.up, b.up, threads);
  parallel_ranges(d.rows, threads, rows_worth_a_thread(d.inner_size), [&](int64_t first, int64_t last) {
    for_vectors(first * d.inner_size, last * d.inner_size,
                [&](int64_t i, int count) { store(b.gate + i, count, silu(load(b.gate + i, count)) * load(b.up + i, count)); });
  });
  linear(d, b.gate, d.inner_size, layer.down, b.update, threads);
}

// x += update (where there is one), normed = norm(x).
void add_and_normalize(const Decoder& d, const NormWeights& norm, const Buffers& b, bool has_update, float* normed, int threads) {
  const int64_t width = d.hidden_size;
  parallel_ranges(d.rows, threads, rows_worth_a_thread(width), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      if (has_update) add_rows(b.x + row * width, b.update + row * width, width, b.x + row * width);
      normalize(b.x + row * width, norm.weight, norm.eps, width, normed + row * width);
    }
  });
}

// The first row whose token, length or pages are out of range, or -1.
int64_t first_bad_row(const Decoder& d) {
  for (int64_t row = 0; row < d.rows; ++row) {
    const int64_t length = d.lengths[row];
    if (d.tokens[row] < 0 || d.tokens[row] >= d.vocab_size) return row;
    if (length < 1 || length > d.positions || length > d.table_stride * d.page_size) return row;
    for (int64_t block = 0; block * d.page_size < length; ++block) {
      const int32_t page = d.block_table[row * d.table_stride + block];
      if (page < 0 || page >= d.pages) return row;
    }
  }
  return -1;
}

}  // namespace

int64_t decoder_step(const Decoder& d, const DecoderLayer* layers, int64_t count, float* scratch, int threads) {
  const int64_t bad = first_bad_row(d);
  if (bad >= 0) return bad;
  const Buffers b = carve(d, scratch);
  for (int64_t row = 0; row < d.rows; ++row) {
    d.context_lens[row] = static_cast<int32_t>(d.lengths[row]);
    std::memcpy(b.x + row * d.hidden_size, d.embedding + d.tokens[row] * d.hidden_size, d.hidden_size * sizeof(float));
  }
  for (int64_t i = 0; i < count; ++i) {
    add_and_normalize(d, layers[i].input_norm, b, i > 0, b.normed, threads);
    attend(d, layers[i], b, threads);
    add_and_normalize(d, layers[i].post_norm, b, true, b.normed, threads);
    feed_forward(d, layers[i], b, threads);
  }
  add_and_normalize(d, d.norm, b, count > 0, b.x, threads);
  return -1;
}

}  // namespace fastppo::FASTPPO_ISA
