// The gate of a SwiGLU layer, silu(gate) * up with silu(x) = x sigmoid(x) (arXiv:2002.05202, eq. 5), and its backward pass.
#include <algorithm>

#include "layer_rows.h"

namespace fastppo::FASTPPO_ISA {

void swiglu(const float* gate, const float* up, int64_t count, float* out, int threads) {
  parallel_ranges((count + kLanes - 1) / kLanes, threads, kElementsWorthAThread / kLanes, [&](int64_t first, int64_t last) {
    for_vectors(first * kLanes, std::min(last * kLanes, count),
                [&](int64_t i, int n) { store(out + i, n, silu(load(gate + i, n)) * load(up + i, n)); });
  });
}

// silu'(x) = s + x s (1 - s) with s = sigmoid(x). `out`, where it is wanted, is the forward pass's: cheaper to make again than to keep.
void swiglu_backward(const float* gate, const float* up, const float* d_out, int64_t count, float* d_gate, float* d_up, float* out, int threads) {
  parallel_ranges((count + kLanes - 1) / kLanes, threads, kElementsWorthAThread / kLanes, [&](int64_t first, int64_t last) {
    for_vectors(first * kLanes, std::min(last * kLanes, count), [&](int64_t i, int n) {
      const vfloat x = load(gate + i, n), u = load(up + i, n), d = load(d_out + i, n);
      const vfloat s = 1.0f / (vexp(-x) + 1.0f), activated = x * s;
      store(d_gate + i, n, d * u * (s + activated * (1.0f - s)));
      store(d_up + i, n, d * activated);
      if (out) store(out + i, n, activated * u);
    });
  });
}

}  // namespace fastppo::FASTPPO_ISA
