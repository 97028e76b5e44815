// Every launcher of fastppo._C: raw pointers, sizes in elements, strides in elements. No torch, no Python.
//
// Conventions: outputs are contiguous and allocated by the caller; a null pointer means "not wanted"; labels, lengths and offsets are validated
// here on the CPU before memory is touched; masks are bytes (0 or 1). Accumulation is fp32 or wider whatever the storage type.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTPPO_HOST_DEVICE __host__ __device__
#else
#define FASTPPO_HOST_DEVICE
#endif

namespace fastppo {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Rows of a tensor [outer, inner, width] whose last stride is 1; the two leading dimensions may have any strides.
struct Rows {
  const void* data;
  DType dtype;
  int64_t outer, inner, width;
  int64_t stride_outer, stride_inner;
  FASTPPO_HOST_DEVICE int64_t count() const { return outer * inner; }
  FASTPPO_HOST_DEVICE int64_t offset(int64_t row) const { return (row / inner) * stride_outer + (row % inner) * stride_inner; }
};

// Consecutive elements of one of the storage types; null data: not given.
struct Column {
  const void* data;
  DType dtype;
};

// z = softcap * tanh(x * scale / softcap) / temperature; softcap 0 leaves the tanh out.
struct LogitTransform {
  float scale, softcap, temperature;
};

// A row's sums over the columns so far: m = max z, sum exp(z - m) - 1 without the largest element's 1 ever being added, sum exp(z - m) (z - m), and
// z of the label. Before the first column: -inf, -1, 0, NaN.
struct PartialRow {
  double max, rest, weighted, label_z;
};

// Sequences of tokens: a table [count, length] (offsets null), or packed, where sequence i holds tokens [offsets[i], offsets[i + 1]).
struct Sequences {
  const int64_t* offsets;
  int64_t count, length;
  FASTPPO_HOST_DEVICE int64_t begin(int64_t i) const { return offsets ? offsets[i] : i * length; }  // flat positions, as contiguous outputs have them
  FASTPPO_HOST_DEVICE int64_t end(int64_t i) const { return begin(i + 1); }
  int64_t tokens() const { return begin(count); }
};

// An input over sequences, of any strides: element (i, t) of a table, (0, flat position) of packed tokens. Null data: not given.
struct Steps {
  const void* data;
  DType dtype;  // of numbers; masks and flags are bytes
  int64_t stride_sequence, stride_step;
};

struct GaeInputs {
  Steps rewards, values;
  Steps next_values;             // V(s_{t+1}) of each step; null: the next kept step's value
  Steps mask, dones, truncated;  // steps left out; episodes that end, or are cut, after a step. `truncated` only beside next_values
  const float* bootstrap;        // [count] value after each sequence's last step, where next_values is null; null: 0
  const float* decays;           // [count] gamma * lambda of each sequence; null: `decay` for all
  float gamma, decay;
};

// Of a set of numbers; `squares` is the sum of squared deviations from the mean.
struct Moments {
  double count, mean, squares;
};

enum KLKind : int { kK1 = 0, kK2 = 1, kK3 = 2, kAbs = 3, kK1Plus = 4, kK3Plus = 5 };

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

// The PPO loss: what each token brings. The last two are made by ppo_loss_sequences.
enum PPOColumn {
  kLogprobs, kOldLogprobs, kAdvantages, kValues, kOldValues, kReturns, kRefLogprobs, kEntropy, kRolloutLogprobs, kWeights, kSequenceLogRatios,
  kNumPPOColumns
};

struct PPOTokens {
  Column columns[kNumPPOColumns];
  const uint8_t* mask;  // null: every token counts
  int64_t count;
};

enum RolloutCorrection : int { kNoCorrection, kTruncate, kMaskOut };

// A coefficient of 0 leaves its term out, dual_clip and value_clip 0 mean off.
struct PPOOptions {
  float ratio_min, ratio_max, dual_clip, value_clip, vf_coef, kl_coef, entropy_coef, rollout_min, rollout_max;
  KLKind kl_kind;
  RolloutCorrection correction;
  bool cispo;
};

// Sums over the unmasked tokens: the statistics first, in the order of fastppo.ops.ppo_loss.PPOStats. The three losses and the entropy bonus are sums
// with the tokens' weights; kRatioMax is a maximum; kTokens counts.
enum PPOSum {
  kPolicyLoss, kValueLoss, kKLLoss, kEntropySum, kApproxKL, kPPOKL, kClipped, kDualClipped, kValueClipped, kRatio, kRatioMax, kRefKL, kRolloutWeight,
  kRolloutClipped, kTokens, kEntropyBonus, kNumPPOSums, kNumPPOStatistics = kEntropyBonus
};

struct PPOGradients {
  float *logprobs, *values, *entropy;  // [count] each, or null; of the sum of the tokens' losses: to be multiplied by PPOResult.scale
};

// Scalars, and the statistics [kNumPPOStatistics].
struct PPOResult {
  float *loss, *statistics;
  double* scale;  // 1 / denominator
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

// logprobs[i] = z[i, labels[i]] - logsumexp(z[i]); max_logsum [count, 2] = (max z, log sum exp(z - max)): their sum would lose digits, and the second has
// all of its own, as the log-probability of a token that is nearly certain needs; entropy optional; an ignored row gives 0. Returns the first row
// whose label is outside [0, width), or -1.
FASTPPO_EACH_ISA(int64_t token_logprobs_forward(const Rows& logits, const int64_t* labels, int64_t ignore_index, LogitTransform transform, float* logprobs,
                                                float* entropy, float* max_logsum, int threads))

// Adds fp32 columns [count, width], contiguous, to the rows' sums. labels count from the tile's first column: one outside of it belongs to another tile.
FASTPPO_EACH_ISA(void token_logprobs_add_tile(const float* tile, const int64_t* labels, int64_t count, int64_t width, LogitTransform transform, bool entropy,
                                              PartialRow* state, int threads))

// grad_logits (same storage type, contiguous rows unless grad_logits == logits.data, then the rows' own places) =
// d_logprobs * (onehot - p) - d_entropy * p * (log p + entropy), times dz/dx. d_entropy may be null. A label outside
// [0, width) that is not ignore_index stands in columns that `logits` does not hold.
FASTPPO_EACH_ISA(void token_logprobs_backward(const Rows& logits, const int64_t* labels, int64_t ignore_index, LogitTransform transform, const float* max_logsum,
                                              const float* entropy, const float* d_logprobs, const float* d_entropy, void* grad_logits, int threads))

// One token a row after top-k, top-p and min-p; width <= 2^22. A row without a distribution or with a parameter out of range: -1, NaN, NaN, 0.
FASTPPO_EACH_ISA(void sample_tokens(const Rows& logits, const SamplingParameters& parameters, const SampledRows& out, int threads))

namespace fastppo {

constexpr int kMaxHeadSize = 256;

// q [batch, heads, head_size] (stride q_stride between sequences), k_pages [pages, page_size, kv_heads, head_size], v_pages the same with
// value_size (k_page_stride and v_page_stride elements from page to page, contiguous within), block_table int32 [batch, max_blocks],
// context_lens int32 [batch], sinks fp32 [heads] or null, out [batch, heads, value_size].
// softcap 0 and window 0 are off. All of q, pages and out have storage type dtype.
struct DecodeAttention {
  const void *q, *k_pages, *v_pages;
  const int32_t *block_table, *context_lens;
  const float* sinks;
  void* out;
  DType dtype;
  int64_t batch, heads, kv_heads, pages, page_size, max_blocks, q_stride, k_page_stride, v_page_stride;
  int head_size, value_size;
  float scale, softcap;
  int64_t window;
};

// Rows of k and v (of k_row_bytes, v_row_bytes) go to places slots[token] of the caches, whose pages are k_page_bytes and v_page_bytes apart; negative slots are skipped.
struct WriteKv {
  const void *k, *v;
  void *k_pages, *v_pages;
  const int64_t* slots;
  int64_t tokens, pages, page_size, k_stride_bytes, v_stride_bytes, k_row_bytes, v_row_bytes, k_page_bytes, v_page_bytes;
};

}  // namespace fastppo

// Returns the first sequence whose length or pages are out of range, or -1. A sequence of length 0 gives 0.
FASTPPO_EACH_ISA(int64_t decode_attention(const DecodeAttention& arguments, int threads))

// Returns the first token whose slot is beyond the cache, or -1.
FASTPPO_EACH_ISA(int64_t write_kv(const WriteKv& arguments))

namespace fastppo {

// out [rows, columns] = a [rows, inner] b [inner, columns], plus what out holds (accumulate), plus bias [columns] (or null): strides in elements, of b's
// two one is 1, consecutive elements in out's rows. accumulate: float32 alone.
struct Matmul {
  const void *a, *b, *bias;
  void* out;
  DType dtype;
  int64_t rows, columns, inner, a_row, a_inner, b_inner, b_column, out_row;
  bool accumulate;
};

}  // namespace fastppo

// Accumulated in fp32, rounded once. An output's bits depend on nothing but its row and its column.
FASTPPO_EACH_ISA(void matmul(const Matmul& arguments, int threads))

namespace fastppo {

// weight [columns, inner] whose rows are `stride` apart; bias [columns] or null.
struct LinearWeights {
  const float *weight, *bias;
  int64_t columns, stride;
};

// Of an RMS norm; a null weight: there is none.
struct NormWeights {
  const float* weight;
  float eps;
};

// x += o(attention(q, k, v of input_norm(x))), x += down(silu(gate(y)) * up(y)) with y = post_norm(x). The pages hold this layer's keys and values; window 0 is off.
struct DecoderLayer {
  NormWeights input_norm, q_norm, k_norm, post_norm;
  LinearWeights q, k, v, o, gate, up, down;
  float *k_pages, *v_pages;
  float scale;
  int64_t window;
};

// tokens [rows] at the ends of sequences with `lengths` [rows] tokens, those included, whose pages block_table [rows, table_stride] names; embedding
// [vocab_size, hidden_size]; cos and sin [positions, rotary_size]. hidden [rows, hidden_size] is the result; context_lens [rows] is scratch.
struct Decoder {
  const int64_t *tokens, *lengths;
  const int32_t* block_table;
  const float *embedding, *cos, *sin;
  NormWeights norm;
  float* hidden;
  int32_t* context_lens;
  int64_t rows, table_stride, pages, page_size, vocab_size, positions, rotary_size, hidden_size, inner_size, heads, kv_heads, head_size;
};

}  // namespace fastppo

// One decode step in fp32, which also stores the new keys and values. scratch: rows * (2 hidden_size + 2 (heads + kv_heads) head_size + 2 inner_size) floats.
// Returns the first row whose token, length or pages are out of range, before anything is written, or -1.
FASTPPO_EACH_ISA(int64_t decoder_step(const Decoder& step, const DecoderLayer* layers, int64_t count, float* scratch, int threads))

namespace fastppo {

// Rows x [rows, width], weight [width].
struct RmsNorm {
  const float *x, *weight;
  float eps;
  int64_t rows, width;
};

// x [rows, heads, head_size], rows x_stride apart; positions [rows] in cos and sin [.., rotary_size].
struct RotaryEmbedding {
  const float *x, *cos, *sin;
  const int64_t* positions;
  int64_t rows, heads, head_size, rotary_size, x_stride;
};

// q [queries, heads, head_size], k and v [tokens, kv_heads, head_size], rows `stride` apart; out [queries, heads, head_size] and lse [queries, heads]
// contiguous. sequences [count, 6]: the first token of a prompt that stands apart, one past its last, and the same of the sequence's own tokens,
// which see that prompt and those of themselves that are not after them; the first token that is a query, as are all after it, and its row in q.
// window 0 is off.
struct PackedAttention {
  const float *q, *k, *v;
  const int64_t* sequences;
  float *out, *lse;
  int64_t count, heads, kv_heads, head_size, q_stride, k_stride, v_stride;
  float scale;
  int64_t window;
};

// All in the shapes of out, q, k and v, contiguous; what d_q, d_k and d_v hold is added to.
struct PackedAttentionGradients {
  const float* d_out;
  float *d_q, *d_k, *d_v;
};

}  // namespace fastppo

// out = x / rms(x) * weight, of x + update where there is an update: that goes to `sum`.
FASTPPO_EACH_ISA(void rms_norm(const RmsNorm& arguments, const float* update, float* sum, float* out, int threads))

// d_x = the gradient through the norm, plus d_sum (or null), which may be d_x; added to d_weight (or null).
FASTPPO_EACH_ISA(void rms_norm_backward(const RmsNorm& arguments, const float* d_out, const float* d_sum, float* d_x, float* d_weight, int threads))

// out [rows, heads, head_size]: x rotated to its positions or, backward, the gradient of what was; may be x.
FASTPPO_EACH_ISA(void rotary_embedding(const RotaryEmbedding& arguments, bool backward, float* out, int threads))

// out = silu(gate) * up, [count] each.
FASTPPO_EACH_ISA(void swiglu(const float* gate, const float* up, int64_t count, float* out, int threads))

// d_gate and d_up may be gate and up, and out (or null) is the forward pass's.
FASTPPO_EACH_ISA(void swiglu_backward(const float* gate, const float* up, const float* d_out, int64_t count, float* d_gate, float* d_up, float* out,
                                      int threads))

// Causal attention; a token has the bits that decode_attention gives it.
FASTPPO_EACH_ISA(void packed_attention(const PackedAttention& arguments, int threads))

// groups [count + 1]: bounds of runs of sequences, in their order; sequences of different groups share no token.
FASTPPO_EACH_ISA(void packed_attention_backward(const PackedAttention& arguments, const PackedAttentionGradients& gradients, const int64_t* groups,
                                                int64_t count, int threads))

// For each token what its sequence decides: weights [count] = 1 / unmasked tokens of the sequence, log_ratios [count] = the mean of
// logprob - old_logprob over them. Either may be null; without log_ratios no column is read. used_sequences: how many have an unmasked token.
FASTPPO_EACH_ISA(void ppo_loss_sequences(const PPOTokens& tokens, const Sequences& sequences, float* weights, float* log_ratios, double* used_sequences,
                                         int threads))

namespace fastppo {

constexpr int64_t kPPOPart = 512;  // tokens whose sums are made in fp32; parts are added in fp64, in order, whichever thread made them
inline int64_t ppo_loss_parts(int64_t tokens) { return (tokens + kPPOPart - 1) / kPPOPart; }

}  // namespace fastppo

// The token losses, statistics and gradients in one pass. part_sums [ppo_loss_parts, kNumPPOSums].
FASTPPO_EACH_ISA(void ppo_loss_tokens(const PPOTokens& tokens, const PPOOptions& options, float* part_sums, const PPOGradients& gradients, int threads))

// The result from the sums of any number of parts; denominator null: the number of unmasked tokens.
FASTPPO_EACH_ISA(void ppo_loss_finish(const float* part_sums, int64_t parts, const PPOOptions& options, const double* denominator, const PPOResult& result))

// First i whose offset is wrong, or -1: offsets [count + 1] start at 0, never fall and end at `tokens`.
FASTPPO_EACH_ISA(int64_t first_bad_offset(const int64_t* offsets, int64_t count, int64_t tokens))

// delta_t = r_t + gamma V_{t+1} - V_t; advantages_t = delta_t + decay * advantages_{t+1}; returns = advantages + V; fp32, 0 at masked steps.
FASTPPO_EACH_ISA(void gae(const GaeInputs& inputs, const Sequences& sequences, float* advantages, float* returns, int threads))

// Flat position of the first truncated step, kept and not done, that is not its sequence's last kept step; -1 when there is none.
FASTPPO_EACH_ISA(int64_t first_unbootstrapped_truncation(const Steps& mask, const Steps& dones, const Steps& truncated, const Sequences& sequences))

// Of the elements of x [count] where mask is set; mask may be null.
FASTPPO_EACH_ISA(Moments masked_moments(const float* x, const uint8_t* mask, int64_t count, int threads))

// out [count] = (x - mean) / sqrt(variance + 1e-8), plus the mean if keep_mean, 0 where masked; variance = squares / (moments.count - 1).
FASTPPO_EACH_ISA(void masked_whiten(const float* x, const uint8_t* mask, int64_t count, Moments moments, bool keep_mean, float* out, int threads))

// kl [count] estimated from logprobs - ref_logprobs.
FASTPPO_EACH_ISA(void approx_kl(const float* logprobs, const float* ref_logprobs, int64_t count, KLKind kind, float* kl, int threads))

// grad [count] = d_kl * d kl / d logprobs; the gradient of ref_logprobs is its negative.
FASTPPO_EACH_ISA(void approx_kl_backward(const float* logprobs, const float* ref_logprobs, const float* d_kl, int64_t count, KLKind kind, float* grad,
                                         int threads))

// rewards (flat) = -coef * kl where mask is set, 0 elsewhere, plus scores[i] at the last set position of sequence i. coef 0: no kl is computed.
FASTPPO_EACH_ISA(void kl_shaped_rewards(const float* scores, const float* logprobs, const float* ref_logprobs, const uint8_t* mask,
                                        const Sequences& sequences, float coef, KLKind kind, float* rewards, int threads))
