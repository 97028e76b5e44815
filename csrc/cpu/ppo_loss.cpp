// The PPO loss over tokens: policy, value, KL and entropy terms, their gradients and the statistics, in one read of the inputs.
#include <vector>

#include "approx_kl.h"
#include "parallel.h"

namespace fastppo::FASTPPO_ISA {
namespace {

constexpr int64_t kBlock = 512;  // tokens whose sums are made in fp32; blocks are added in fp64, in order, whichever thread made them
constexpr int64_t kBlocksPerThread = 8;

// torch.clamp's gradient: it flows at the bounds and stops beyond. A NaN stays, in value and gradient.
FASTPPO_INLINE vint outside(const vfloat& x, const vfloat& low, const vfloat& high) { return (x < low) | (x > high); }

FASTPPO_INLINE vfloat clamp(const vfloat& x, const vfloat& low, const vfloat& high) { return select(x < low, low, select(x > high, high, x)); }

FASTPPO_INLINE vfloat indicator(const vint& condition) { return select(condition, vfloat(1.0f), vfloat(0.0f)); }

// At most kBlock tokens as the loops read them: fp32 columns and a mask, padded with masked places to whole vectors.
struct Block {
  int64_t first, size;
  const float* column[kNumPPOColumns];  // null: not given
  const uint8_t* mask;
  float column_scratch[kNumPPOColumns][kBlock];  // where the tokens' own memory has another type or ends too early
  uint8_t mask_scratch[kBlock];

  FASTPPO_MEMBER void load(const PPOTokens& tokens, int64_t begin, int64_t end, int columns) {
    first = begin;
    size = end - begin;
    for (int c = 0; c < columns; ++c) column[c] = load_column(tokens.columns[c], column_scratch[c]);
    mask = tokens.mask + begin;
    if (!tokens.mask || size % kLanes) {
      for (int64_t i = 0; i < size; ++i) mask_scratch[i] = tokens.mask ? mask[i] : 1;
      for (int64_t i = size; i % kLanes; ++i) mask_scratch[i] = 0;
      mask = mask_scratch;
    }
  }

  FASTPPO_MEMBER const float* load_column(const Column& source, float* scratch) const {
    const bool as_it_is = source.dtype == kFloat32 && size % kLanes == 0;
    if (!source.data || as_it_is) return source.data ? static_cast<const float*>(source.data) + first : nullptr;
    with_storage(source.dtype, [&](auto storage) {
      using Storage = decltype(storage);
      const auto* data = static_cast<const typename Storage::type*>(source.data) + first;
      int64_t i = 0;
      for (; i + kLanes <= size; i += kLanes) F32::store(scratch + i, Storage::load(data + i));
      if (i < size) F32::store(scratch + i, load_tail<Storage>(data + i, static_cast<int>(size - i), 0));
    });
    return scratch;
  }

  FASTPPO_MEMBER vint load_mask(int64_t i) const {
    typedef uint8_t Bytes __attribute__((vector_size(kRegisterBytes / 4)));  // as many elements as one register of int32
    vint out;
    for (int part = 0; part < vint::kParts; ++part) {
      Bytes bytes;
      std::memcpy(&bytes, mask + i + part * (kRegisterBytes / 4), sizeof bytes);
      out.part[part] = __builtin_convertvector(bytes, vint::Register);
    }
    return out != 0;
  }
};

struct PolicyTerm {
  vfloat loss, gradient, ratio;  // gradient: d loss / d logprob
  vint clipped, dual_clipped;
};

// max(-A ratio, -A clip(ratio)), at most -A dual_clip where A < 0; or CISPO's -A clip(ratio) logprob, whose clipped ratio is a constant weight.
FASTPPO_INLINE PolicyTerm policy_term(const vfloat& logprob, const vfloat& log_ratio, const vfloat& advantage, const PPOOptions& o) {
  const vfloat zero = 0.0f;
  const vfloat ratio = vexp(clamp(log_ratio, -kMaxLogRatio, kMaxLogRatio));
  const vfloat clipped_ratio = clamp(ratio, o.ratio_min, o.ratio_max);
  const vfloat plain = -advantage * ratio, with_clip = -advantage * clipped_ratio;
  if (o.cispo) return {with_clip * logprob, with_clip, ratio, outside(ratio, o.ratio_min, o.ratio_max), 0};
  const vint clipped = with_clip > plain;
  const vfloat larger = select(clipped, with_clip, plain);
  const vfloat bound = -advantage * o.dual_clip;
  const vint dual_clipped = o.dual_clip > 0 ? (advantage < 0.0f) & (larger > bound) : vint(0);
  // d ratio / d logprob = ratio; a clipped loss or log-ratio is constant.
  const vint constant = clipped | dual_clipped | outside(log_ratio, -kMaxLogRatio, kMaxLogRatio);
  return {select(dual_clipped, bound, larger), select(constant, zero, plain), ratio, clipped, dual_clipped};
}

struct RolloutWeight {
  vfloat raw;                // exp(old - rollout)
  vfloat applied;
  vint changed, masked_out;  // masked_out: the policy term is selected away, not multiplied by 0
};

FASTPPO_INLINE RolloutWeight rollout_weight(const vfloat& old_logprob, const vfloat& rollout_logprob, const PPOOptions& o) {
  const vfloat raw = vexp(clamp(old_logprob - rollout_logprob, -kMaxLogRatio, kMaxLogRatio));
  if (o.correction == kTruncate) {
    const vint above = raw > o.rollout_max;
    return {raw, select(above, vfloat(o.rollout_max), raw), above, 0};
  }
  const vint masked_out = o.correction == kMaskOut ? outside(raw, o.rollout_min, o.rollout_max) : vint(0);
  return {raw, o.correction == kMaskOut ? raw : vfloat(1.0f), masked_out, masked_out};
}

struct ValueTerm {
  vfloat loss, gradient;
  vint clipped;
};

// 0.5 max((v - R)^2, (clip(v, old - c, old + c) - R)^2)
FASTPPO_INLINE ValueTerm value_term(const vfloat& value, const vfloat& old_value, const vfloat& target, float clip) {
  const vfloat error = value - target;
  const vfloat plain = error * error;
  if (clip == 0) return {0.5f * plain, error, 0};
  const vfloat clipped_error = clamp(value, old_value - clip, old_value + clip) - target;
  const vfloat with_clip = clipped_error * clipped_error;
  const vint clipped = with_clip > plain;
  return {0.5f * select(clipped, with_clip, plain), select(clipped, vfloat(0.0f), error), clipped};
}

// The sums of a block's tokens, and their places of the gradients.
void token_block(const Block& block, const PPOOptions& o, const PPOGradients& gradients, float* sums) {
  vfloat total[kNumPPOSums];
  for (vfloat& t : total) t = 0.0f;
  const vfloat zero = 0.0f;
  for (int64_t i = 0; i < block.size; i += kLanes) {
    const vint mask = block.load_mask(i);
    auto given = [&](PPOColumn c) __attribute__((always_inline)) { return block.column[c] != nullptr; };
    auto load = [&](PPOColumn c) __attribute__((always_inline)) { return select(mask, F32::load(block.column[c] + i), zero); };
    auto add = [&](PPOSum s, const vfloat& x) __attribute__((always_inline)) { total[s] += select(mask, x, zero); };
    auto store = [&](float* gradient, const vfloat& x) __attribute__((always_inline)) {
      const vfloat kept = select(mask, x, zero);
      if (i + kLanes <= block.size) F32::store(gradient + block.first + i, kept);
      else store_tail<F32>(gradient + block.first + i, static_cast<int>(block.size - i), kept);
    };
    const vfloat weight = given(kWeights) ? load(kWeights) : vfloat(1.0f);
    const vfloat gradient_weight = o.scale * weight;

    const vfloat logprob = load(kLogprobs), old_logprob = load(kOldLogprobs);
    const vfloat token_log_ratio = logprob - old_logprob;
    PolicyTerm policy = policy_term(logprob, given(kSequenceLogRatios) ? load(kSequenceLogRatios) : token_log_ratio, load(kAdvantages), o);
    const vfloat change = clamp(token_log_ratio, -kMaxLogRatio, kMaxLogRatio);
    add(kApproxKL, 0.5f * change * change);
    add(kPPOKL, -change);
    add(kClipped, indicator(policy.clipped));
    add(kDualClipped, indicator(policy.dual_clipped));
    add(kRatio, policy.ratio);
    total[kRatioMax] = vmax(select(mask, policy.ratio, zero), total[kRatioMax]);
    if (given(kRolloutLogprobs)) {
      const RolloutWeight rollout = rollout_weight(old_logprob, load(kRolloutLogprobs), o);
      policy.loss = select(rollout.masked_out, zero, policy.loss * rollout.applied);
      policy.gradient = select(rollout.masked_out, zero, policy.gradient * rollout.applied);
      add(kRolloutWeight, rollout.raw);
      add(kRolloutClipped, indicator(rollout.changed));
    }
    add(kPolicyLoss, weight * policy.loss);

    vfloat d_logprob = policy.gradient;
    if (given(kRefLogprobs)) {
      const vfloat ref_log_ratio = logprob - load(kRefLogprobs);
      add(kRefKL, kl_value<kK3>(ref_log_ratio));
      with_kl(o.kl_kind, [&](auto kl) __attribute__((always_inline)) {
        add(kKLLoss, weight * kl.value(ref_log_ratio));
        if (o.kl_coef != 0) d_logprob += o.kl_coef * kl.slope(ref_log_ratio);
      });
    }
    if (gradients.logprobs) store(gradients.logprobs, gradient_weight * d_logprob);
    if (given(kValues)) {
      const ValueTerm term = value_term(load(kValues), o.value_clip != 0 ? load(kOldValues) : zero, load(kReturns), o.value_clip);
      add(kValueLoss, weight * term.loss);
      add(kValueClipped, indicator(term.clipped));
      if (gradients.values) store(gradients.values, gradient_weight * o.vf_coef * term.gradient);
    }
    if (given(kEntropy)) {
      const vfloat entropy = load(kEntropy);
      add(kEntropyBonus, weight * entropy);
      add(kEntropySum, entropy);
      if (gradients.entropy) store(gradients.entropy, -o.entropy_coef * gradient_weight);
    }
  }
  for (int s = 0; s < kNumPPOSums; ++s) sums[s] = s == kRatioMax ? max_lanes(total[s]) : sum_lanes(total[s]);
}

struct SequenceSums {
  int64_t tokens;
  double log_ratio;
};

SequenceSums sum_sequence(const PPOTokens& tokens, int64_t first, int64_t last, bool log_ratios) {
  SequenceSums sums{0, 0.0};
  Block block;
  for (int64_t begin = first; begin < last; begin += kBlock) {
    block.load(tokens, begin, last - begin < kBlock ? last : begin + kBlock, log_ratios ? kOldLogprobs + 1 : 0);
    vfloat kept = 0.0f, log_ratio = 0.0f;
    for (int64_t i = 0; i < block.size; i += kLanes) {
      const vint mask = block.load_mask(i);
      kept += indicator(mask);
      if (log_ratios) log_ratio += select(mask, F32::load(block.column[kLogprobs] + i) - F32::load(block.column[kOldLogprobs] + i), vfloat(0.0f));
    }
    sums.tokens += static_cast<int64_t>(sum_lanes(kept));
    sums.log_ratio += sum_lanes(log_ratio);
  }
  return sums;
}

int64_t first_bad_offset(const Sequences& sequences, int64_t tokens) {
  if (!sequences.offsets) return -1;
  if (sequences.offsets[0] != 0) return 0;
  for (int64_t s = 0; s < sequences.count; ++s)
    if (sequences.offsets[s + 1] < sequences.offsets[s]) return s + 1;
  return sequences.offsets[sequences.count] == tokens ? -1 : sequences.count;
}

}  // namespace

PPOCounts ppo_loss_sequences(const PPOTokens& tokens, const Sequences& sequences, float* weights, float* log_ratios, int threads) {
  PPOCounts counts{0, 0, first_bad_offset(sequences, tokens.count)};
  if (counts.bad_offset >= 0) return counts;
  std::vector<int64_t> kept(sequences.count);
  parallel_ranges(sequences.count, threads, 1, [&](int64_t first_sequence, int64_t last_sequence) {
    for (int64_t s = first_sequence; s < last_sequence; ++s) {
      const int64_t first = sequences.begin(s), last = sequences.begin(s + 1);
      const SequenceSums sums = sum_sequence(tokens, first, last, log_ratios != nullptr);
      kept[s] = sums.tokens;
      const double count = static_cast<double>(sums.tokens > 0 ? sums.tokens : 1);
      if (weights)
        for (int64_t i = first; i < last; ++i) weights[i] = static_cast<float>(1.0 / count);
      if (log_ratios)
        for (int64_t i = first; i < last; ++i) log_ratios[i] = static_cast<float>(sums.log_ratio / count);
    }
  });
  for (const int64_t n : kept) {
    counts.tokens += n;
    counts.sequences += n > 0;
  }
  return counts;
}

void ppo_loss_tokens(const PPOTokens& tokens, const PPOOptions& options, double* sums, const PPOGradients& gradients, int threads) {
  const int64_t blocks = (tokens.count + kBlock - 1) / kBlock;
  std::vector<float> partial(blocks * kNumPPOSums);
  parallel_ranges(blocks, threads, kBlocksPerThread, [&](int64_t first_block, int64_t last_block) {
    Block block;
    for (int64_t b = first_block; b < last_block; ++b) {
      const int64_t end = (b + 1) * kBlock;
      block.load(tokens, b * kBlock, end < tokens.count ? end : tokens.count, kNumPPOColumns);
      token_block(block, options, gradients, &partial[b * kNumPPOSums]);
    }
  });
  for (int s = 0; s < kNumPPOSums; ++s) sums[s] = 0;
  for (int64_t b = 0; b < blocks; ++b)
    for (int s = 0; s < kNumPPOSums; ++s) {
      const double x = partial[b * kNumPPOSums + s];
      sums[s] = s != kRatioMax ? sums[s] + x : sums[s] > x ? sums[s] : x;
    }
}

}  // namespace fastppo::FASTPPO_ISA
