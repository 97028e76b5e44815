// The RMS norm of rows, with the addition of a residual branch before it, and its backward pass.
#include <algorithm>
#include <vector>

#include "layer_rows.h"

namespace fastppo::FASTPPO_ISA {
namespace {

constexpr int64_t kRowsOfAPart = 64;  // whose weight gradients are summed before they are added to the others': part of the order of the sums

}  // namespace

void rms_norm(const RmsNorm& a, const float* update, float* sum, float* out, int threads) {
  parallel_ranges(a.rows, threads, rows_worth_a_thread(a.width), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float* x = a.x + row * a.width;
      if (update) {
        add_rows(x, update + row * a.width, a.width, sum + row * a.width);
        x = sum + row * a.width;
      }
      normalize(x, a.weight, a.eps, a.width, out + row * a.width);
    }
  });
}

// With r = 1 / rms(x): d_x = r (w d_out) - x r^3 mean(w d_out x), d_w = sum d_out x r.
void rms_norm_backward(const RmsNorm& a, const float* d_out, const float* d_sum, float* d_x, float* d_weight, int threads) {
  const int64_t parts = (a.rows + kRowsOfAPart - 1) / kRowsOfAPart;
  std::vector<float> sums(d_weight ? parts * a.width : 0);
  parallel_ranges(parts, threads, (rows_worth_a_thread(a.width) + kRowsOfAPart - 1) / kRowsOfAPart, [&](int64_t first, int64_t last) {
    for (int64_t row = first * kRowsOfAPart; row < std::min(last * kRowsOfAPart, a.rows); ++row) {
      const float *x = a.x + row * a.width, *d = d_out + row * a.width, *beside = d_sum ? d_sum + row * a.width : nullptr;
      const float r = inverse_rms(x, a.eps, a.width);
      vfloat products = 0.0f;
      for_vectors(0, a.width, [&](int64_t i, int count) { products += load(a.weight + i, count) * load(d + i, count) * load(x + i, count); });
      const float slope = r * r * r * sum_lanes(products) / static_cast<float>(a.width);
      float *to = d_x + row * a.width, *sum = d_weight ? sums.data() + row / kRowsOfAPart * a.width : nullptr;
      for_vectors(0, a.width, [&](int64_t i, int count) {
        const vfloat value = load(x + i, count), slopes = load(d + i, count);
        vfloat gradient = load(a.weight + i, count) * slopes * r - value * slope;
        if (beside) gradient += load(beside + i, count);
        if (sum) store(sum + i, count, load(sum + i, count) + slopes * value * r);
        store(to + i, count, gradient);
      });
    }
  });
  if (d_weight)
    for (int64_t part = 0; part < parts; ++part) add_rows(d_weight, sums.data() + part * a.width, a.width, d_weight);
}

}  // namespace fastppo::FASTPPO_ISA
