// KL estimates of tokens, their gradients, and rewards shaped by them: one read and one write each. Formulas: csrc/common/kl.h.
#include "../common/kl.h"
#include "device.h"
#include "launch.h"
#include "launchers.h"

namespace fastppo::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 4;  // loads in flight of each column
constexpr int64_t kTile = kThreads * kPerThread;
constexpr int64_t kLongSequence = 1024;

// Of this thread's tokens of a tile, d = logprob - ref_logprob; all loads first. `kept(i)` says which tokens are read at all.
template <class Kept>
__device__ __forceinline__ void load_log_ratios(const Column& logprobs, const Column& ref_logprobs, int64_t first, const Kept& kept,
                                                float (&d)[kPerThread]) {
  float logprob[kPerThread], ref_logprob[kPerThread];
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int64_t i = first + k * kThreads;
    logprob[k] = kept(k, i) ? load_number(logprobs.data, logprobs.dtype, i) : 0.0f;
    ref_logprob[k] = kept(k, i) ? load_number(ref_logprobs.data, ref_logprobs.dtype, i) : 0.0f;
  }
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) d[k] = logprob[k] - ref_logprob[k];
}

template <class Estimator>
__global__ void __launch_bounds__(kThreads) approx_kl_kernel(const Column logprobs, const Column ref_logprobs, int64_t count, float* __restrict__ kl) {
  const int64_t first = blockIdx.x * kTile + threadIdx.x;
  float d[kPerThread];
  load_log_ratios(logprobs, ref_logprobs, first, [&](int, int64_t i) { return i < count; }, d);
#pragma unroll
  for (int k = 0; k < kPerThread; ++k)
    if (first + k * kThreads < count) kl[first + k * kThreads] = Estimator::value(d[k]);
}

template <class Estimator>
__global__ void __launch_bounds__(kThreads) approx_kl_backward_kernel(const Column logprobs, const Column ref_logprobs, const float* __restrict__ d_kl,
                                                                      int64_t count, float* __restrict__ grad) {
  const int64_t first = blockIdx.x * kTile + threadIdx.x;
  float d[kPerThread];
  load_log_ratios(logprobs, ref_logprobs, first, [&](int, int64_t i) { return i < count; }, d);
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int64_t i = first + k * kThreads;
    if (i < count) grad[i] = d_kl[i] * Estimator::slope(d[k]);
  }
}

// rewards = -coef * kl where the mask is set, 0 elsewhere; NaN everywhere when the offsets are wrong.
template <class Estimator>
__global__ void __launch_bounds__(kThreads) kl_rewards_kernel(const Column logprobs, const Column ref_logprobs, const uint8_t* __restrict__ mask,
                                                              const int64_t* __restrict__ offsets, int64_t count, float coef, float* __restrict__ rewards) {
  const int64_t first = blockIdx.x * kTile + threadIdx.x;
  bool keep[kPerThread];
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) keep[k] = coef != 0 && first + k * kThreads < count && mask[first + k * kThreads];  // no 0 * inf
  float d[kPerThread];
  load_log_ratios(logprobs, ref_logprobs, first, [&](int k, int64_t) { return keep[k]; }, d);
  const bool bad = offsets && offsets[0] == kBadOffset;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int64_t i = first + k * kThreads;
    if (i < count) rewards[i] = bad ? NAN : keep[k] ? -coef * Estimator::value(d[k]) : 0.0f;
  }
}

struct Later {
  __device__ __forceinline__ int64_t operator()(int64_t a, int64_t b) const { return a > b ? a : b; }
};

// Adds each sequence's score at the last place whose mask is set: a block looks for it from the sequence's end.
template <int kBlockThreads>
__global__ void __launch_bounds__(kBlockThreads) add_scores_kernel(const Column scores, const uint8_t* __restrict__ mask, const Sequences sequences,
                                                                   float* __restrict__ rewards) {
  constexpr int kAtOnce = 8;
  const int64_t sequence = blockIdx.x, begin = sequences.begin(sequence);
  int64_t last = -1;
  for (int64_t end = sequences.end(sequence); end > begin && last < 0; end -= kAtOnce * kBlockThreads) {
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int64_t i = end - 1 - threadIdx.x - k * kBlockThreads;
      if (i >= begin && mask[i]) last = last > i ? last : i;
    }
    last = block_reduce<kBlockThreads>(last, Later{});
  }
  if (threadIdx.x == 0 && last >= 0) rewards[last] += load_number(scores.data, scores.dtype, sequence);
}

}  // namespace

cudaError_t approx_kl(const Column& logprobs, const Column& ref_logprobs, int64_t count, KLKind kind, float* kl, cudaStream_t stream) {
  return with_kl(kind, [&](auto estimator) {
    return launch(approx_kl_kernel<decltype(estimator)>, blocks_for(count, kTile), kThreads, 0, stream, logprobs, ref_logprobs, count, kl);
  });
}

cudaError_t approx_kl_backward(const Column& logprobs, const Column& ref_logprobs, const float* d_kl, int64_t count, KLKind kind, float* grad,
                               cudaStream_t stream) {
  return with_kl(kind, [&](auto estimator) {
    return launch(approx_kl_backward_kernel<decltype(estimator)>, blocks_for(count, kTile), kThreads, 0, stream, logprobs, ref_logprobs, d_kl, count, grad);
  });
}

cudaError_t kl_shaped_rewards(const Column& scores, const Column& logprobs, const Column& ref_logprobs, const uint8_t* mask, const Sequences& sequences,
                              int64_t tokens, float coef, KLKind kind, float* rewards, cudaStream_t stream) {
  const cudaError_t error = with_kl(kind, [&](auto estimator) {
    return launch(kl_rewards_kernel<decltype(estimator)>, blocks_for(tokens, kTile), kThreads, 0, stream, logprobs, ref_logprobs, mask, sequences.offsets,
                  tokens, coef, rewards);
  });
  if (error != cudaSuccess) return error;
  const bool are_long = tokens > sequences.count * kLongSequence;
  const auto kernel = are_long ? add_scores_kernel<kThreads> : add_scores_kernel<kWarpSize>;
  return launch(kernel, static_cast<unsigned>(sequences.count), are_long ? kThreads : kWarpSize, 0, stream, scores, mask, sequences, rewards);
}

}  // namespace fastppo::cuda
