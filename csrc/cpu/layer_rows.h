// What stands between the matrix products of a Llama-like layer, a row at a time: what decode steps and training share, so that both have the same bits.
#pragma once

#include <cmath>

#include "parallel.h"

namespace fastppo::FASTPPO_ISA {
namespace {

constexpr int64_t kElementsWorthAThread = 1 << 14;

FASTPPO_INLINE int64_t rows_worth_a_thread(int64_t width) { return (kElementsWorthAThread + width - 1) / width; }

// 1 / rms(x), rms(x) = sqrt(mean(x^2) + eps).
FASTPPO_INLINE float inverse_rms(const float* x, float eps, int64_t width) {
  vfloat squares = 0.0f;
  for_vectors(0, width, [&](int64_t i, int count) {
    const vfloat v = load(x + i, count);
    squares += v * v;
  });
  return 1.0f / std::sqrt(sum_lanes(squares) / static_cast<float>(width) + eps);
}

// out = x / rms(x) * weight (arXiv:1910.07467, eq. 4); may be in place. Returns 1 / rms(x).
FASTPPO_INLINE float normalize(const float* x, const float* weight, float eps, int64_t width, float* out) {
  const float factor = inverse_rms(x, eps, width);
  for_vectors(0, width, [&](int64_t i, int count) { store(out + i, count, load(weight + i, count) * (load(x + i, count) * factor)); });
  return factor;
}

// out = x + y; may be in place.
FASTPPO_INLINE void add_rows(const float* x, const float* y, int64_t width, float* out) {
  for_vectors(0, width, [&](int64_t i, int count) { store(out + i, count, load(x + i, count) + load(y + i, count)); });
}

// Rotary embedding (arXiv:2104.09864) of the first `width` elements of a head, whose two halves hold the pairs.
FASTPPO_INLINE void rotate(const float* head, const float* cos, const float* sin, int64_t width, float* out) {
  const int64_t half = width / 2;
  for_vectors(0, half, [&](int64_t i, int count) {
    const vfloat low = load(head + i, count), high = load(head + half + i, count);
    store(out + i, count, low * load(cos + i, count) - high * load(sin + i, count));
    store(out + half + i, count, high * load(cos + half + i, count) + low * load(sin + half + i, count));
  });
}

// The gradient of what was rotated: the transposed rotation.
FASTPPO_INLINE void rotate_back(const float* d_head, const float* cos, const float* sin, int64_t width, float* out) {
  const int64_t half = width / 2;
  for_vectors(0, half, [&](int64_t i, int count) {
    const vfloat low = load(d_head + i, count), high = load(d_head + half + i, count);
    store(out + i, count, low * load(cos + i, count) + high * load(sin + half + i, count));
    store(out + half + i, count, high * load(cos + half + i, count) - low * load(sin + i, count));
  });
}

FASTPPO_INLINE vfloat silu(const vfloat& x) { return x / (vexp(-x) + 1.0f); }

}  // namespace
}  // namespace fastppo::FASTPPO_ISA
