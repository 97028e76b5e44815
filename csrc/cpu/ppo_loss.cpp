// The PPO loss over tokens: policy, value, KL and entropy terms, their gradients and the statistics, in one read of the inputs.
// The formulas of a token stand in csrc/common/ppo_token.h.
#include <vector>

#include "../common/ppo_token.h"
#include "masks.h"
#include "parallel.h"

namespace fastppo::FASTPPO_ISA {
namespace {

constexpr int64_t kPartsPerThread = 8;

FASTPPO_INLINE vfloat indicator(const vint& condition) { return select(condition, vfloat(1.0f), vfloat(0.0f)); }

// At most kPPOPart tokens as the loops read them: fp32 columns and a mask, padded with masked places to whole vectors.
struct Block {
  int64_t first, size;
  const float* column[kNumPPOColumns];  // null: not given
  const uint8_t* mask;
  float column_scratch[kNumPPOColumns][kPPOPart];  // where the tokens' own memory has another type or ends too early
  uint8_t mask_scratch[kPPOPart];

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
};

// Sixteen tokens of a block, as ppo_token asks for them.
struct Lanes {
  using Number = vfloat;
  const Block& block;
  vfloat (&total)[kNumPPOSums];
  int64_t i;
  vint mask;

  FASTPPO_MEMBER bool given(PPOColumn c) const { return block.column[c] != nullptr; }
  FASTPPO_MEMBER vfloat load(PPOColumn c) const { return select(mask, F32::load(block.column[c] + i), vfloat(0.0f)); }
  FASTPPO_MEMBER void add(PPOSum s, const vfloat& x) { total[s] += select(mask, x, vfloat(0.0f)); }
  FASTPPO_MEMBER void count(PPOSum s, const vint& condition) { total[s] += indicator(mask & condition); }
  FASTPPO_MEMBER void raise(PPOSum s, const vfloat& x) { total[s] = vmax(select(mask, x, vfloat(0.0f)), total[s]); }
  FASTPPO_MEMBER void store(float* gradient, const vfloat& x) const {
    if (!gradient) return;
    const int count = static_cast<int>(block.size - i < kLanes ? block.size - i : kLanes);
    fastppo::FASTPPO_ISA::store(gradient + block.first + i, count, select(mask, x, vfloat(0.0f)));
  }
};

// The sums of a block's tokens, and their places of the gradients.
void token_block(const Block& block, const PPOOptions& options, const PPOGradients& gradients, float* sums) {
  vfloat total[kNumPPOSums];
  for (vfloat& t : total) t = 0.0f;
  for (int64_t i = 0; i < block.size; i += kLanes) {
    Lanes lanes{block, total, i, load_mask(block.mask + i)};
    total[kTokens] += indicator(lanes.mask);
    ppo_token(lanes, options, gradients);
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
  for (int64_t begin = first; begin < last; begin += kPPOPart) {
    block.load(tokens, begin, last - begin < kPPOPart ? last : begin + kPPOPart, log_ratios ? kOldLogprobs + 1 : 0);
    vfloat kept = 0.0f, log_ratio = 0.0f;
    for (int64_t i = 0; i < block.size; i += kLanes) {
      const vint mask = load_mask(block.mask + i);
      kept += indicator(mask);
      if (log_ratios) log_ratio += select(mask, F32::load(block.column[kLogprobs] + i) - F32::load(block.column[kOldLogprobs] + i), vfloat(0.0f));
    }
    sums.tokens += static_cast<int64_t>(sum_lanes(kept));
    sums.log_ratio += sum_lanes(log_ratio);
  }
  return sums;
}

}  // namespace

void ppo_loss_sequences(const PPOTokens& tokens, const Sequences& sequences, float* weights, float* log_ratios, double* used_sequences, int threads) {
  std::vector<uint8_t> used(sequences.count);
  parallel_ranges(sequences.count, threads, 1, [&](int64_t first_sequence, int64_t last_sequence) {
    for (int64_t s = first_sequence; s < last_sequence; ++s) {
      const int64_t first = sequences.begin(s), last = sequences.end(s);
      const SequenceSums sums = sum_sequence(tokens, first, last, log_ratios != nullptr);
      used[s] = sums.tokens > 0;
      const double count = static_cast<double>(sums.tokens > 0 ? sums.tokens : 1);
      if (weights)
        for (int64_t i = first; i < last; ++i) weights[i] = static_cast<float>(1.0 / count);
      if (log_ratios)
        for (int64_t i = first; i < last; ++i) log_ratios[i] = static_cast<float>(sums.log_ratio / count);
    }
  });
  *used_sequences = 0;
  for (const uint8_t is_used : used) *used_sequences += is_used;
}

void ppo_loss_tokens(const PPOTokens& tokens, const PPOOptions& options, float* part_sums, const PPOGradients& gradients, int threads) {
  parallel_ranges(ppo_loss_parts(tokens.count), threads, kPartsPerThread, [&](int64_t first_part, int64_t last_part) {
    Block block;
    for (int64_t p = first_part; p < last_part; ++p) {
      const int64_t end = (p + 1) * kPPOPart;
      block.load(tokens, p * kPPOPart, end < tokens.count ? end : tokens.count, kNumPPOColumns);
      token_block(block, options, gradients, part_sums + p * kNumPPOSums);
    }
  });
}

void ppo_loss_finish(const float* part_sums, int64_t parts, const PPOOptions& options, const double* denominator, const PPOResult& result) {
  double sums[kNumPPOSums] = {};
  for (int64_t p = 0; p < parts; ++p)
    for (int s = 0; s < kNumPPOSums; ++s) {
      const double x = part_sums[p * kNumPPOSums + s];
      sums[s] = s != kRatioMax ? sums[s] + x : sums[s] > x ? sums[s] : x;
    }
  finish_ppo_loss(sums, options, denominator, result);
}

}  // namespace fastppo::FASTPPO_ISA
