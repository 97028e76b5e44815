// Every launcher of fastppo._C.cuda. As csrc/ops.h has it for the CPU, but all pointers are the device's and nothing is read on the host: offsets,
// labels or lengths out of range give NaN or are skipped, and no access leaves the tensors. Work is enqueued on the stream; scratch comes from the
// caller.
#pragma once

#include <cuda_runtime.h>

#include "../ops.h"

namespace fastppo::cuda {

// Packed sequences come with offsets that check_offsets has seen, and with their number of tokens as `length`.
constexpr int64_t kBadOffset = -1;

// out [count + 1] = offsets (int64, or int32) if they start at 0, never fall and end at `tokens`; else kBadOffset everywhere, and what is computed
// with them shall be NaN.
cudaError_t check_offsets(const void* offsets, bool are_int64, int64_t count, int64_t tokens, int64_t* out, cudaStream_t stream);

// As on the CPU, in one launch. A truncated step without a value to bootstrap from gives NaN, and so do wrong offsets, everywhere.
cudaError_t gae(const GaeInputs& inputs, const Sequences& sequences, float* advantages, float* returns, cudaStream_t stream);

// Moments that masked_moments writes for parts of x, and takes as scratch.
constexpr int kMaxPartialMoments = 1024;

// How many elements of x [count] have mask set, their mean and the sum of squared deviations from it; mask may be null. partial [kMaxPartialMoments] is
// scratch. The order of additions depends on `count` alone.
cudaError_t masked_moments(const Column& x, const uint8_t* mask, int64_t count, Moments* partial, double* moment_count, double* mean, double* squares,
                           cudaStream_t stream);

// out [count] = (x - mean) / sqrt(variance + 1e-8), plus the mean if keep_mean, 0 where masked. The moments are read one by one: they may come from
// a merge over processes.
cudaError_t masked_whiten(const Column& x, const uint8_t* mask, int64_t count, const double* moment_count, const double* mean, const double* squares,
                          bool keep_mean, float* out, cudaStream_t stream);

// Bytes of scratch, aligned to 16, that sample_tokens takes.
size_t sample_tokens_scratch(int64_t rows, int64_t width);

// One token a row, the one that the CPU's sample_tokens chooses; width <= 2^22. A row without a distribution or with a parameter out of range: -1,
// NaN, NaN, 0.
cudaError_t sample_tokens(const Rows& logits, const SamplingParameters& parameters, const SampledRows& out, void* scratch, cudaStream_t stream);

// Columns and count as on the CPU; wrong offsets make them NaN. partial [ppo_sequence_parts, 2] is scratch. Two launches.
int64_t ppo_sequence_parts(int64_t tokens, int64_t count);
cudaError_t ppo_loss_sequences(const PPOTokens& tokens, const Sequences& sequences, double* partial, float* weights, float* log_ratios,
                               double* used_sequences, cudaStream_t stream);

// As on the CPU, in one launch each. A denominator that is not a number > 0 makes the loss and the gradients NaN.
int64_t ppo_loss_parts(int64_t tokens);
cudaError_t ppo_loss_tokens(const PPOTokens& tokens, const PPOOptions& options, float* part_sums, const PPOGradients& gradients, cudaStream_t stream);
cudaError_t ppo_loss_finish(const float* part_sums, int64_t parts, const PPOOptions& options, const double* denominator, const PPOResult& result,
                            cudaStream_t stream);

// to [count] = from [count] * d_loss * scale, rounded once; count 0: no gradient.
struct ScaledGradient {
  Column from;
  void* to;
  DType dtype;  // of `to`
  int64_t count;
};
constexpr int kMaxScaledGradients = 3;
struct ScaledGradients {
  ScaledGradient each[kMaxScaledGradients];
};
cudaError_t scale_gradients(const ScaledGradients& gradients, const float* d_loss, const double* scale, cudaStream_t stream);

// As on the CPU, from any storage types, in one launch.
cudaError_t approx_kl(const Column& logprobs, const Column& ref_logprobs, int64_t count, KLKind kind, float* kl, cudaStream_t stream);
cudaError_t approx_kl_backward(const Column& logprobs, const Column& ref_logprobs, const float* d_kl, int64_t count, KLKind kind, float* grad,
                               cudaStream_t stream);

// As on the CPU; wrong offsets make all rewards NaN. Two launches.
cudaError_t kl_shaped_rewards(const Column& scores, const Column& logprobs, const Column& ref_logprobs, const uint8_t* mask, const Sequences& sequences,
                              int64_t tokens, float coef, KLKind kind, float* rewards, cudaStream_t stream);

}  // namespace fastppo::cuda
