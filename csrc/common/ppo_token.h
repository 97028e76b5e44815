// The PPO loss of a token: its terms, their gradients and what it adds to the statistics. One copy for every device, over the Number of
// csrc/common/number.h. Formulas: fastppo/reference/ppo_loss.py.
#pragma once

#include "../ops.h"
#include "kl.h"
#include "number.h"

namespace fastppo {

template <class Number>
struct PolicyTerm {
  Number loss, gradient, ratio;  // gradient: d loss / d logprob
  Condition<Number> clipped, dual_clipped;
};

// max(-A ratio, -A clip(ratio)), at most -A dual_clip where A < 0; or CISPO's -A clip(ratio) logprob, whose clipped ratio is a constant weight.
template <class Number>
FASTPPO_SHARED PolicyTerm<Number> policy_term(const Number& logprob, const Number& log_ratio, const Number& advantage, const PPOOptions& o) {
  const Number ratio = vexp(clamp(log_ratio, -kMaxLogRatio, kMaxLogRatio));
  const Number clipped_ratio = clamp(ratio, o.ratio_min, o.ratio_max);
  const Number plain = -advantage * ratio, with_clip = -advantage * clipped_ratio;
  const Condition<Number> never(0);
  if (o.cispo) return {with_clip * logprob, with_clip, ratio, outside(ratio, o.ratio_min, o.ratio_max), never};
  const Condition<Number> clipped = with_clip > plain;
  const Number larger = select(clipped, with_clip, plain);
  const Number bound = -advantage * o.dual_clip;
  const Condition<Number> dual_clipped = o.dual_clip > 0 ? (advantage < 0.0f) & (larger > bound) : never;
  // d ratio / d logprob = ratio; a clipped loss or log-ratio is constant.
  const Condition<Number> constant = clipped | dual_clipped | outside(log_ratio, -kMaxLogRatio, kMaxLogRatio);
  return {select(dual_clipped, bound, larger), select(constant, Number(0.0f), plain), ratio, clipped, dual_clipped};
}

template <class Number>
struct RolloutWeight {
  Number raw;                              // exp(old - rollout)
  Number applied;
  Condition<Number> changed, masked_out;  // masked_out: the policy term is selected away, not multiplied by 0
};

template <class Number>
FASTPPO_SHARED RolloutWeight<Number> rollout_weight(const Number& old_logprob, const Number& rollout_logprob, const PPOOptions& o) {
  const Number raw = vexp(clamp(old_logprob - rollout_logprob, -kMaxLogRatio, kMaxLogRatio));
  const Condition<Number> never(0);
  if (o.correction == kTruncate) {
    const Condition<Number> above = raw > o.rollout_max;
    return {raw, select(above, Number(o.rollout_max), raw), above, never};
  }
  if (o.correction == kNoCorrection) return {raw, Number(1.0f), never, never};
  const Condition<Number> masked_out = outside(raw, o.rollout_min, o.rollout_max);
  return {raw, raw, masked_out, masked_out};
}

template <class Number>
struct ValueTerm {
  Number loss, gradient;
  Condition<Number> clipped;
};

// 0.5 max((v - R)^2, (clip(v, old - c, old + c) - R)^2)
template <class Number>
FASTPPO_SHARED ValueTerm<Number> value_term(const Number& value, const Number& old_value, const Number& target, float clip) {
  const Number error = value - target;
  const Number plain = error * error;
  if (clip == 0) return {0.5f * plain, error, Condition<Number>(0)};
  const Number clipped_error = clamp(value, old_value - clip, old_value + clip) - target;
  const Number with_clip = clipped_error * clipped_error;
  const Condition<Number> clipped = with_clip > plain;
  return {0.5f * select(clipped, with_clip, plain), select(clipped, Number(0.0f), error), clipped};
}

// All of a token's terms. `Token` says where it comes from and goes to, and keeps masked places out of both:
//   Number                      the type of its numbers
//   given(column), load(column) whether there is such a column, and the token's number in it
//   add(sum, x), count(sum, c)  to a sum: x, or 1 where c holds
//   raise(sum, x)               to a maximum
//   store(pointer, x)           to its place of a gradient [count], if the pointer is not null
FASTPPO_CALLS_ANY
template <class Token>
FASTPPO_SHARED void ppo_token(Token& token, const PPOOptions& o, const PPOGradients& gradients) {
  using Number = typename Token::Number;
  const Number zero = 0.0f;
  const Number weight = token.given(kWeights) ? token.load(kWeights) : Number(1.0f);
  const Number logprob = token.load(kLogprobs), old_logprob = token.load(kOldLogprobs);
  const Number log_ratio = logprob - old_logprob;
  PolicyTerm<Number> policy = policy_term(logprob, token.given(kSequenceLogRatios) ? token.load(kSequenceLogRatios) : log_ratio, token.load(kAdvantages), o);
  const Number change = clamp(log_ratio, -kMaxLogRatio, kMaxLogRatio);
  token.add(kApproxKL, 0.5f * change * change);
  token.add(kPPOKL, -change);
  token.count(kClipped, policy.clipped);
  token.count(kDualClipped, policy.dual_clipped);
  token.add(kRatio, policy.ratio);
  token.raise(kRatioMax, policy.ratio);
  if (token.given(kRolloutLogprobs)) {
    const RolloutWeight<Number> rollout = rollout_weight(old_logprob, token.load(kRolloutLogprobs), o);
    policy.loss = select(rollout.masked_out, zero, policy.loss * rollout.applied);
    policy.gradient = select(rollout.masked_out, zero, policy.gradient * rollout.applied);
    token.add(kRolloutWeight, rollout.raw);
    token.count(kRolloutClipped, rollout.changed);
  }
  token.add(kPolicyLoss, weight * policy.loss);

  Number d_logprob = policy.gradient;
  if (token.given(kRefLogprobs)) {
    const Number ref_log_ratio = logprob - token.load(kRefLogprobs);
    token.add(kRefKL, Kl<kK3>::value(ref_log_ratio));
    with_kl(o.kl_kind, [&](auto kl) {
      token.add(kKLLoss, weight * kl.value(ref_log_ratio));
      if (o.kl_coef != 0) d_logprob = d_logprob + o.kl_coef * kl.slope(ref_log_ratio);
    });
  }
  token.store(gradients.logprobs, weight * d_logprob);
  if (token.given(kValues)) {
    const ValueTerm<Number> term = value_term(token.load(kValues), o.value_clip != 0 ? token.load(kOldValues) : zero, token.load(kReturns), o.value_clip);
    token.add(kValueLoss, weight * term.loss);
    token.count(kValueClipped, term.clipped);
    token.store(gradients.values, weight * o.vf_coef * term.gradient);
  }
  if (token.given(kEntropy)) {
    const Number entropy = token.load(kEntropy);
    token.add(kEntropyBonus, weight * entropy);
    token.add(kEntropySum, entropy);
    token.store(gradients.entropy, -o.entropy_coef * weight);
  }
}

// The loss, its statistics [kNumPPOStatistics] and the scale of its gradients from the sums over all tokens. An empty batch gives 0 whatever its
// denominator, which may well be 0; one that is not above 0 gives NaN.
FASTPPO_SHARED void finish_ppo_loss(const double* sums, const PPOOptions& o, const double* denominator, const PPOResult& result) {
  const double tokens = sums[kTokens], divisor = denominator ? *denominator : tokens;
  const bool valid = divisor > 0 && divisor <= 1.7976931348623157e308;
  const double scale = tokens == 0 ? 0.0 : valid ? 1 / divisor : NAN;
  for (int i = 0; i < kNumPPOStatistics; ++i) {
    const bool is_loss = i <= kKLLoss, is_mean = i != kRatioMax && i != kTokens;
    result.statistics[i] = static_cast<float>(is_loss ? sums[i] * scale : is_mean ? sums[i] / (tokens > 0 ? tokens : 1) : sums[i]);
  }
  // A maximum of comparisons does not see a NaN; a sum does.
  if (sums[kRatio] != sums[kRatio]) result.statistics[kRatioMax] = NAN;
  double loss = sums[kPolicyLoss] * scale;
  // A term with coefficient 0 is left out, not multiplied by 0: should it be infinite, the others stay.
  if (o.vf_coef != 0) loss += o.vf_coef * (sums[kValueLoss] * scale);
  if (o.kl_coef != 0) loss += o.kl_coef * (sums[kKLLoss] * scale);
  if (o.entropy_coef != 0) loss -= o.entropy_coef * (sums[kEntropyBonus] * scale);
  *result.loss = static_cast<float>(loss);
  *result.scale = scale;
}

}  // namespace fastppo
