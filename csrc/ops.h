// Every launcher of fastppo._C: raw pointers, sizes in elements, strides in elements. No torch, no Python.
//
// Conventions: outputs are contiguous and allocated by the caller; a null pointer means "not wanted"; labels, lengths and offsets are validated
// here on the CPU before memory is touched; masks are bytes (0 or 1). Accumulation is fp32 or wider whatever the storage type.
#pragma once

#include <cstdint>

namespace fastppo {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Rows of a tensor [outer, inner, width] whose last stride is 1; the two leading dimensions may have any strides.
struct Rows {
  const void* data;
  DType dtype;
  int64_t outer, inner, width;
  int64_t stride_outer, stride_inner;
  int64_t count() const { return outer * inner; }
  int64_t offset(int64_t row) const { return (row / inner) * stride_outer + (row % inner) * stride_inner; }
};

// z = softcap * tanh(x * scale / softcap) / temperature; softcap 0 leaves the tanh out.
struct LogitTransform {
  float scale, softcap, temperature;
};

// One value for each row of logits.
struct SamplingParameters {
  const float* temperature;
  const int64_t* top_k;
  const float *top_p, *min_p;
  const int64_t *sequence_ids, *positions;
  uint64_t seed;
};

struct SampledRows {
  int64_t* tokens;
  float *logprobs, *processed_logprobs, *kept_mass;
};

}  // namespace fastppo

// Each CPU kernel is compiled once for every instruction set, into a namespace of that name.
#if defined(__x86_64__)
#define FASTPPO_EACH_ISA(declaration) \
  namespace fastppo::avx512 {         \
  declaration;                        \
  }                                   \
  namespace fastppo::avx2 {           \
  declaration;                        \
  }                                   \
  namespace fastppo::plain {          \
  declaration;                        \
  }
#else
#define FASTPPO_EACH_ISA(declaration) \
  namespace fastppo::plain {          \
  declaration;                        \
  }
#endif

// logprobs[i] = z[i, labels[i]] - logsumexp(z[i]); max_logsum [count, 2] = (max z, log sum exp(z - max)): their sum would lose digits; entropy optional; an ignored row gives 0. Returns the first row whose label is outside [0, width), or -1.
FASTPPO_EACH_ISA(int64_t token_logprobs_forward(const Rows& logits, const int64_t* labels, int64_t ignore_index, LogitTransform transform, float* logprobs,
                                                float* entropy, float* max_logsum, int threads))

// grad_logits (same storage type, contiguous rows unless grad_logits == logits.data, then the rows' own places) =
// d_logprobs * (onehot - p) - d_entropy * p * (log p + entropy), times dz/dx. d_entropy may be null.
FASTPPO_EACH_ISA(void token_logprobs_backward(const Rows& logits, const int64_t* labels, int64_t ignore_index, LogitTransform transform, const float* max_logsum,
                                              const float* entropy, const float* d_logprobs, const float* d_entropy, void* grad_logits, int threads))

// One token a row after top-k, top-p and min-p; width <= 2^22. A row without a distribution or with a parameter out of range: -1, NaN, NaN, 0.
FASTPPO_EACH_ISA(void sample_tokens(const Rows& logits, const SamplingParameters& parameters, const SampledRows& out, int threads))
