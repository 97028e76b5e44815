// The PPO loss over tokens: policy, value, KL and entropy terms, their gradients and the statistics, in one read of the inputs.
//
//   tokens: a block sums a part, each thread several tokens; formulas in csrc/common/ppo_token.h. Gradients are those of the sum, so that nothing has
//           to be counted first.
//   finish: one block adds the parts in a fixed order; the loss, its statistics and the scale that the gradients still lack.
//   scale_gradients: in the backward pass, the loss' own gradient and the scale at once.
//   sequences: where sequences matter, a pass before: counts and mean log-ratios, a warp for each share of a sequence.
#include "../common/ppo_token.h"
#include "device.h"
#include "launch.h"
#include "launchers.h"

namespace fastppo::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int64_t kUsefulBlocks = 4 * 132;            // all that an H200 holds at once
constexpr int kMinPerThread = 4, kMaxPerThread = 16;  // fewer would not pay for the block's sums, more would cost digits of fp32 ones

// The columns of a plain PPO step come first in PPOColumn: a kernel that knows no others has registers for one block more on a processor.
constexpr int kCommonColumns = kEntropy;
constexpr int blocks_at_once(int columns) { return columns == kCommonColumns ? 4 : 3; }

__device__ __forceinline__ uint32_t load_bits(const void* data, DType dtype, int64_t i) {
  return dtype == kFloat32 ? __ldg(static_cast<const uint32_t*>(data) + i) : __ldg(static_cast<const uint16_t*>(data) + i);
}

__device__ __forceinline__ float bits_to_float(uint32_t bits, DType dtype) {
  if (dtype == kFloat32) return __uint_as_float(bits);
  return dtype == kBFloat16 ? __uint_as_float(bits << 16) : half_to_float(static_cast<uint16_t>(bits));
}

// An unmasked token, as ppo_token asks for it. Bits lie as they came from memory: nothing waits for a load before its number is asked for.
template <bool kAllFloat32, int kColumns>
struct Lane {
  using Number = float;
  const PPOTokens& tokens;
  float (&total)[kNumPPOSums];
  uint32_t bits[kColumns];
  int64_t i;

  __device__ __forceinline__ DType dtype(int c) const { return kAllFloat32 ? kFloat32 : tokens.columns[c].dtype; }
  __device__ __forceinline__ void fetch(int64_t place) {
    i = place;
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (tokens.columns[c].data) bits[c] = load_bits(tokens.columns[c].data, dtype(c), i);
  }
  __device__ __forceinline__ bool given(PPOColumn c) const { return c < kColumns && tokens.columns[c].data; }
  __device__ __forceinline__ float load(PPOColumn c) const { return bits_to_float(bits[c < kColumns ? c : 0], dtype(c)); }
  __device__ __forceinline__ void add(PPOSum s, float x) { total[s] += x; }
  __device__ __forceinline__ void count(PPOSum s, bool condition) { total[s] += condition ? 1.0f : 0.0f; }
  __device__ __forceinline__ void raise(PPOSum s, float x) { total[s] = vmax(x, total[s]); }
  __device__ __forceinline__ void store(float* gradient, float x) const {
    if (gradient) gradient[i] = x;
  }
};

__device__ __forceinline__ void store_zeros(const PPOGradients& gradients, int64_t i) {
  if (gradients.logprobs) gradients.logprobs[i] = 0.0f;
  if (gradients.values) gradients.values[i] = 0.0f;
  if (gradients.entropy) gradients.entropy[i] = 0.0f;
}

// The warp's sum of x[lane / 2]. Each exchange halves the numbers that a lane still has to add up: 16 exchanges for 16 sums, not 80.
__device__ __forceinline__ float warp_sums(float (&x)[kNumPPOSums]) {
  static_assert(kNumPPOSums == kWarpSize / 2, "two lanes for each sum");
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int half = kNumPPOSums / 2; half >= 1; half /= 2) {
    const bool upper = lane & (2 * half);
#pragma unroll
    for (int s = 0; s < half; ++s) {
      const float given_away = upper ? x[s] : x[s + half], kept = upper ? x[s + half] : x[s];
      x[s] = kept + __shfl_xor_sync(kFullWarp, given_away, 2 * half);
    }
  }
  return x[0] + __shfl_xor_sync(kFullWarp, x[0], 1);
}

// out [kNumPPOSums]: the block's sums of `total`, and its maximum.
__device__ __forceinline__ void store_block_sums(float (&total)[kNumPPOSums], float* __restrict__ out) {
  __shared__ float of_warps[kWarps][kNumPPOSums];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const float ratio_max = warp_reduce(total[kRatioMax], Max{});
  const float sum = warp_sums(total);
  if (lane % 2 == 0) of_warps[warp][lane / 2] = sum;
  __syncwarp();
  if (lane == 0) of_warps[warp][kRatioMax] = ratio_max;
  __syncthreads();
  const int s = threadIdx.x;
  if (s >= kNumPPOSums) return;
  float result = of_warps[0][s];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) result = s == kRatioMax ? vmax(result, of_warps[w][s]) : result + of_warps[w][s];
  out[s] = result;
}

// The mask's byte as it comes: whoever compares it waits for it.
__device__ __forceinline__ unsigned load_mask(const PPOTokens& tokens, int64_t i) {
  return i >= tokens.count ? 0 : tokens.mask ? __ldg(tokens.mask + i) : 1;
}

// A token is on its way while the one before is computed, and its mask one token earlier: masked ones are not even read.
template <bool kAllFloat32, int kColumns>
__global__ void __launch_bounds__(kThreads, blocks_at_once(kColumns))
    ppo_loss_tokens_kernel(const PPOTokens tokens, const PPOOptions options, int per_thread, float* __restrict__ part_sums, const PPOGradients gradients) {
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads * per_thread + threadIdx.x;
  float total[kNumPPOSums] = {};
  Lane<kAllFloat32, kColumns> next{tokens, total, {}, i};
  unsigned next_mask = load_mask(tokens, i), later_mask = load_mask(tokens, i + kThreads);
  if (next_mask) next.fetch(i);
#pragma unroll 1
  for (int k = 0; k < per_thread; ++k, i += kThreads) {
    Lane<kAllFloat32, kColumns> now = next;
    const unsigned now_mask = next_mask;
    next_mask = k + 1 < per_thread ? later_mask : 0;
    if (next_mask) next.fetch(i + kThreads);
    later_mask = load_mask(tokens, i + 2 * kThreads);
    if (now_mask) {
      total[kTokens] += 1.0f;
      ppo_token(now, options, gradients);
    } else if (i < tokens.count) {
      store_zeros(gradients, i);
    }
  }
  store_block_sums(total, part_sums + static_cast<int64_t>(blockIdx.x) * kNumPPOSums);
}

// How many tokens each thread takes, by their number alone: the same tokens have the same bits on every GPU.
int per_thread(int64_t tokens) {
  const int64_t shared_out = (tokens + kUsefulBlocks * kThreads - 1) / (kUsefulBlocks * kThreads);
  return static_cast<int>(shared_out < kMinPerThread ? kMinPerThread : shared_out < kMaxPerThread ? shared_out : kMaxPerThread);
}

template <bool kAllFloat32>
auto tokens_kernel(bool all_common) {
  return all_common ? ppo_loss_tokens_kernel<kAllFloat32, kCommonColumns> : ppo_loss_tokens_kernel<kAllFloat32, kNumPPOColumns>;
}

// ---- finish

constexpr int kFinishThreads = 1024;
constexpr int kRowsAtOnce = kFinishThreads / kNumPPOSums;

__device__ __forceinline__ double combine(int s, double a, double b) { return s != kRatioMax ? a + b : a > b ? a : b; }

// Thread (row, s) adds sum s of parts row, row + kRowsAtOnce ..., then rows fold in halves.
__global__ void __launch_bounds__(kFinishThreads) ppo_loss_finish_kernel(const float* __restrict__ part_sums, int64_t parts, const PPOOptions options,
                                                                         const double* __restrict__ denominator, const PPOResult result) {
  __shared__ double sums[kRowsAtOnce][kNumPPOSums];
  const int row = threadIdx.x / kNumPPOSums, s = threadIdx.x % kNumPPOSums;
  double sum = 0;
#pragma unroll 8
  for (int64_t p = row; p < parts; p += kRowsAtOnce) sum = combine(s, sum, part_sums[p * kNumPPOSums + s]);
  sums[row][s] = sum;
#pragma unroll
  for (int half = kRowsAtOnce / 2; half >= 1; half /= 2) {
    __syncthreads();
    if (row < half) sums[row][s] = combine(s, sums[row][s], sums[row + half][s]);
  }
  __syncthreads();
  if (threadIdx.x == 0) finish_ppo_loss(sums[0], options, denominator, result);
}

// ---- backward

constexpr int kScalePerThread = 4;

__device__ __forceinline__ void store_number(void* data, DType dtype, int64_t i, float x) {
  if (dtype == kFloat32) static_cast<float*>(data)[i] = x;
  else static_cast<uint16_t*>(data)[i] = dtype == kBFloat16 ? float_to_bfloat16(x) : float_to_half(x);
}

__global__ void __launch_bounds__(kThreads) scale_gradients_kernel(const ScaledGradients gradients, const float* __restrict__ d_loss,
                                                                   const double* __restrict__ scale) {
  const ScaledGradient gradient = blockIdx.y == 0 ? gradients.each[0] : blockIdx.y == 1 ? gradients.each[1] : gradients.each[2];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * kScalePerThread + threadIdx.x;
  float x[kScalePerThread];
#pragma unroll
  for (int k = 0; k < kScalePerThread; ++k) {
    const int64_t i = first + k * kThreads;
    x[k] = i < gradient.count ? load_number(gradient.from.data, gradient.from.dtype, i) : 0.0f;
  }
  const float factor = static_cast<float>(*d_loss * *scale);
#pragma unroll
  for (int k = 0; k < kScalePerThread; ++k) {
    const int64_t i = first + k * kThreads;
    if (i < gradient.count) store_number(gradient.to, gradient.dtype, i, x[k] * factor);
  }
}

}  // namespace

int64_t ppo_loss_parts(int64_t tokens) { return blocks_for(tokens, kThreads * per_thread(tokens)); }

cudaError_t ppo_loss_tokens(const PPOTokens& tokens, const PPOOptions& options, float* part_sums, const PPOGradients& gradients, cudaStream_t stream) {
  bool all_float32 = true, all_common = true;
  for (int c = 0; c < kNumPPOColumns; ++c) {
    const Column& column = tokens.columns[c];
    all_float32 &= !column.data || column.dtype == kFloat32;
    all_common &= !column.data || c < kCommonColumns;
  }
  const auto kernel = all_float32 ? tokens_kernel<true>(all_common) : tokens_kernel<false>(all_common);
  const unsigned blocks = static_cast<unsigned>(ppo_loss_parts(tokens.count));
  return launch(kernel, blocks, kThreads, 0, stream, tokens, options, per_thread(tokens.count), part_sums, gradients);
}

cudaError_t ppo_loss_finish(const float* part_sums, int64_t parts, const PPOOptions& options, const double* denominator, const PPOResult& result,
                            cudaStream_t stream) {
  return launch(ppo_loss_finish_kernel, 1, kFinishThreads, 0, stream, part_sums, parts, options, denominator, result);
}

cudaError_t scale_gradients(const ScaledGradients& gradients, const float* d_loss, const double* scale, cudaStream_t stream) {
  int64_t largest = 0;
  for (const ScaledGradient& gradient : gradients.each) largest = gradient.count > largest ? gradient.count : largest;
  const dim3 grid(blocks_for(largest, kThreads * kScalePerThread), kMaxScaledGradients);
  return launch(scale_gradients_kernel, grid, kThreads, 0, stream, gradients, d_loss, scale);
}

}  // namespace fastppo::cuda
