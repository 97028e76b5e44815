// The rotary embedding of heads at their positions, and its backward pass.
#include "layer_rows.h"

namespace fastppo::FASTPPO_ISA {

void rotary_embedding(const RotaryEmbedding& a, bool backward, float* out, int threads) {
  const int64_t width = a.heads * a.head_size;
  parallel_ranges(a.rows, threads, rows_worth_a_thread(width), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float *cos = a.cos + a.positions[row] * a.rotary_size, *sin = a.sin + a.positions[row] * a.rotary_size;
      for (int64_t h = 0; h < a.heads; ++h) {
        const float* head = a.x + row * a.x_stride + h * a.head_size;
        float* to = out + row * width + h * a.head_size;
        if (backward) rotate_back(head, cos, sin, a.rotary_size, to);
        else rotate(head, cos, sin, a.rotary_size, to);
        if (to != head) std::memmove(to + a.rotary_size, head + a.rotary_size, (a.head_size - a.rotary_size) * sizeof(float));
      }
    }
  });
}

}  // namespace fastppo::FASTPPO_ISA
