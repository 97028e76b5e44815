// What sequences decide for their tokens, before csrc/cuda/ppo_loss.cu looks at them: two passes, in which a warp takes an equal share of a sequence
// so that few long sequences keep the whole GPU at work. Shares are added in a fixed order, in fp64.
#include "device.h"
#include "launch.h"
#include "launchers.h"

namespace fastppo::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kPerLane = 4;  // loads in flight of each column
constexpr int64_t kShareTokens = 512;  // as few tokens as are worth a warp
constexpr int64_t kUsefulWarps = 8192;
constexpr int64_t kMaxShares = 256;  // each of a sequence's warps reads the sums of all of them

struct SequenceSums {
  double tokens, log_ratio;
};

struct AddSums {
  __device__ __forceinline__ SequenceSums operator()(const SequenceSums& a, const SequenceSums& b) const {
    return {a.tokens + b.tokens, a.log_ratio + b.log_ratio};
  }
};

// Of a warp: its sequence and its tokens of it.
struct Share {
  int64_t sequence, begin, end;
  bool first;
};

__device__ __forceinline__ Share share_of_warp(const Sequences& sequences, int shares) {
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize, sequence = warp / shares, i = warp % shares;
  if (sequence >= sequences.count) return {sequence, 0, 0, false};
  const int64_t begin = sequences.begin(sequence), length = sequences.end(sequence) - begin;
  return {sequence, begin + length * i / shares, begin + length * (i + 1) / shares, i == 0};
}

__device__ __forceinline__ bool bad_offsets(const Sequences& sequences) { return sequences.offsets && sequences.offsets[0] == kBadOffset; }

__device__ __forceinline__ SequenceSums sum_share(const PPOTokens& tokens, const Share& share, bool log_ratios) {
  const Column &logprobs = tokens.columns[kLogprobs], &old_logprobs = tokens.columns[kOldLogprobs];
  SequenceSums sums = {0, 0};
  for (int64_t begin = share.begin + threadIdx.x % kWarpSize; begin < share.end; begin += kPerLane * kWarpSize) {
    bool keep[kPerLane];
    float logprob[kPerLane] = {}, old_logprob[kPerLane] = {};
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      const int64_t i = begin + k * kWarpSize;
      keep[k] = i < share.end && (!tokens.mask || tokens.mask[i]);
    }
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      if (!log_ratios || !keep[k]) continue;
      logprob[k] = load_number(logprobs.data, logprobs.dtype, begin + k * kWarpSize);
      old_logprob[k] = load_number(old_logprobs.data, old_logprobs.dtype, begin + k * kWarpSize);
    }
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      sums.tokens += keep[k];
      sums.log_ratio += logprob[k] - old_logprob[k];
    }
  }
  return warp_reduce(sums, AddSums{});
}

// partial [count, shares]; used_sequences is made ready for the next pass.
__global__ void __launch_bounds__(kThreads) sequence_sums_kernel(const PPOTokens tokens, const Sequences sequences, int shares, bool log_ratios,
                                                                 SequenceSums* __restrict__ partial, double* __restrict__ used_sequences) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *used_sequences = bad_offsets(sequences) ? NAN : 0.0;
  const Share share = share_of_warp(sequences, shares);
  if (share.sequence >= sequences.count) return;
  const SequenceSums sums = sum_share(tokens, share, log_ratios);
  if (threadIdx.x % kWarpSize == 0) partial[static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize] = sums;
}

// The sums of a whole sequence, in every lane.
__device__ __forceinline__ SequenceSums sum_sequence(const SequenceSums* __restrict__ partial, int shares) {
  SequenceSums sums = {0, 0};
  for (int i = threadIdx.x % kWarpSize; i < shares; i += kWarpSize) sums = AddSums{}(sums, partial[i]);
  sums = warp_reduce(sums, AddSums{});
  return {__shfl_sync(kFullWarp, sums.tokens, 0), __shfl_sync(kFullWarp, sums.log_ratio, 0)};
}

__global__ void __launch_bounds__(kThreads) sequence_columns_kernel(const PPOTokens tokens, const Sequences sequences, int shares,
                                                                    const SequenceSums* __restrict__ partial, float* __restrict__ weights,
                                                                    float* __restrict__ log_ratios, double* __restrict__ used_sequences) {
  if (bad_offsets(sequences)) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < tokens.count; i += step) {
      if (weights) weights[i] = NAN;
      if (log_ratios) log_ratios[i] = NAN;
    }
    return;
  }
  const Share share = share_of_warp(sequences, shares);
  if (share.sequence >= sequences.count) return;
  const SequenceSums sums = sum_sequence(partial + share.sequence * shares, shares);
  const int lane = threadIdx.x % kWarpSize;
  // Ones add up to the same number in any order.
  if (share.first && lane == 0 && sums.tokens > 0) atomicAdd(used_sequences, 1.0);
  const double count = sums.tokens > 0 ? sums.tokens : 1;
  const float weight = static_cast<float>(1 / count), log_ratio = static_cast<float>(sums.log_ratio / count);
  for (int64_t i = share.begin + lane; i < share.end; i += kWarpSize) {
    if (weights) weights[i] = weight;
    if (log_ratios) log_ratios[i] = log_ratio;
  }
}

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Into how many shares each sequence is cut: by the numbers of tokens and sequences alone, so that the same batch always has the same bits.
int64_t shares_of(int64_t tokens, int64_t count) {
  if (count == 0) return 1;
  const int64_t useful = kUsefulWarps / count, worthwhile = ceil_divide(tokens, kShareTokens);
  const int64_t shares = useful < worthwhile ? useful : worthwhile;
  return shares < 1 ? 1 : shares < kMaxShares ? shares : kMaxShares;
}

}  // namespace

int64_t ppo_sequence_parts(int64_t tokens, int64_t count) { return count * shares_of(tokens, count); }

cudaError_t ppo_loss_sequences(const PPOTokens& tokens, const Sequences& sequences, double* partial, float* weights, float* log_ratios,
                               double* used_sequences, cudaStream_t stream) {
  const int shares = static_cast<int>(shares_of(tokens.count, sequences.count));
  SequenceSums* const sums = reinterpret_cast<SequenceSums*>(partial);
  const unsigned blocks = blocks_for(sequences.count * shares, kWarps), at_least_one = blocks > 0 ? blocks : 1;
  const cudaError_t error =
      launch(sequence_sums_kernel, at_least_one, kThreads, 0, stream, tokens, sequences, shares, log_ratios != nullptr, sums, used_sequences);
  if (error != cudaSuccess) return error;
  return launch(sequence_columns_kernel, at_least_one, kThreads, 0, stream, tokens, sequences, shares, sums, weights, log_ratios, used_sequences);
}

}  // namespace fastppo::cuda
