// KL estimates of tokens, their gradients, and rewards shaped by them: one read and one write each.
#include "../common/kl.h"

#include "masks.h"
#include "sequences.h"

namespace fastppo::FASTPPO_ISA {
namespace {

constexpr int64_t kTokensWorthAThread = 16384;

template <class Estimator>
void shaped_range(const float* scores, const float* logprobs, const float* ref_logprobs, const uint8_t* mask, const Sequences& sequences, float coef,
                  float* rewards, int64_t first, int64_t last) {
  for_vectors(sequences.begin(first), sequences.end(last - 1), [&](int64_t i, int count) {
    if (coef == 0) return store(rewards + i, count, vfloat(0.0f));  // no 0 * inf
    const vint keep = load_mask(mask + i, count);
    const vfloat kl = Estimator::value(load(logprobs + i, count) - load(ref_logprobs + i, count));
    store(rewards + i, count, select(keep, -coef * kl, vfloat(0.0f)));
  });
  for (int64_t s = first; s < last; ++s) {
    int64_t i = sequences.end(s) - 1;
    while (i >= sequences.begin(s) && !mask[i]) --i;
    if (i >= sequences.begin(s)) rewards[i] += scores[s];
  }
}

}  // namespace

void approx_kl(const float* logprobs, const float* ref_logprobs, int64_t count, KLKind kind, float* kl, int threads) {
  with_kl(kind, [&](auto estimator) {
    parallel_ranges(count, threads, kTokensWorthAThread, [&](int64_t first, int64_t last) {
      for_vectors(first, last, [&](int64_t i, int size) {
        store(kl + i, size, decltype(estimator)::value(load(logprobs + i, size) - load(ref_logprobs + i, size)));
      });
    });
  });
}

void approx_kl_backward(const float* logprobs, const float* ref_logprobs, const float* d_kl, int64_t count, KLKind kind, float* grad, int threads) {
  with_kl(kind, [&](auto estimator) {
    parallel_ranges(count, threads, kTokensWorthAThread, [&](int64_t first, int64_t last) {
      for_vectors(first, last, [&](int64_t i, int size) {
        const vfloat slope = decltype(estimator)::slope(load(logprobs + i, size) - load(ref_logprobs + i, size));
        store(grad + i, size, load(d_kl + i, size) * slope);
      });
    });
  });
}

void kl_shaped_rewards(const float* scores, const float* logprobs, const float* ref_logprobs, const uint8_t* mask, const Sequences& sequences,
                       float coef, KLKind kind, float* rewards, int threads) {
  with_kl(kind, [&](auto estimator) {
    parallel_sequences(sequences, threads, kTokensWorthAThread, [&](int64_t first, int64_t last) {
      shaped_range<decltype(estimator)>(scores, logprobs, ref_logprobs, mask, sequences, coef, rewards, first, last);
    });
  });
}

}  // namespace fastppo::FASTPPO_ISA
