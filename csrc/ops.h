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

namespace fastppo {

constexpr int kMaxHeadSize = 256;
constexpr int kHeadsAtOnce = 8;  // query heads that share one load of a key: 8 x 2 KiB of state stay in L1

// q [batch, heads, head_size] (stride q_stride between sequences), k_pages [pages, page_size, kv_heads, head_size], v_pages the same with
// value_size, block_table int32 [batch, max_blocks], context_lens int32 [batch], sinks fp32 [heads] or null, out [batch, heads, value_size].
// softcap 0 and window 0 are off. All of q, pages and out have storage type dtype.
struct DecodeAttention {
  const void *q, *k_pages, *v_pages;
  const int32_t *block_table, *context_lens;
  const float* sinks;
  void* out;
  DType dtype;
  int64_t batch, heads, kv_heads, pages, page_size, max_blocks, q_stride;
  int head_size, value_size;
  float scale, softcap;
  int64_t window;
};

// Rows of k and v (of k_row_bytes, v_row_bytes) go to places slots[token] of the caches; negative slots are skipped.
struct WriteKv {
  const void *k, *v;
  void *k_pages, *v_pages;
  const int64_t* slots;
  int64_t tokens, pages, page_size, k_stride_bytes, v_stride_bytes, k_row_bytes, v_row_bytes;
};

}  // namespace fastppo

// Returns the first sequence whose length or pages are out of range, or -1. A sequence of length 0 gives 0.
FASTPPO_EACH_ISA(int64_t decode_attention(const DecodeAttention& arguments, int threads))

// Returns the first token whose slot is beyond the cache, or -1.
FASTPPO_EACH_ISA(int64_t write_kv(const WriteKv& arguments))
