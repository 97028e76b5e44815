// Estimators of KL(policy || reference) from d = logprob - ref_logprob of a sampled token, and their slopes d kl / d logprob.
// One copy for every op and device. Formulas: fastppo/reference/approx_kl.py.
#pragma once

#include "../ops.h"
#include "number.h"

namespace fastppo {

constexpr float kMaxLogRatio = 20, kMaxK3 = 10;

// exp(u) - 1 - u for |u| <= kMaxLogRatio. u = n ln 2 + r, exp(u) - 1 - u = 2^n (exp(r) - 1 - r) + (2^n r + (2^n - 1) - u): near 0, where the difference of exp
// and 1 + u would cancel, n is 0, r is u and the bracket is exactly 0.
template <class Number>
FASTPPO_SHARED Number exp_minus_1_minus(const Number& u) {
  const Number shifted = u * kLog2E + kShifter, n = shifted - kShifter;
  const Number r = (u - n * kLn2High) - n * kLn2Low, scale = power_of_two(shifted);
  return scale * (exp_remainder(r) * (r * r)) + ((scale * r + (scale - 1.0f)) - u);
}

template <class Number>
FASTPPO_SHARED Number clamped_log_ratio(const Number& d) {
  return vmin(Number(kMaxLogRatio), vmax(Number(-kMaxLogRatio), -d));
}

template <KLKind kKind>
struct Kl {
  template <class Number>
  FASTPPO_SHARED static Number value(const Number& d) {
    if constexpr (kKind == kK2) return 0.5f * (d * d);
    else if constexpr (kKind == kAbs) return select(d < 0.0f, -d, d);
    else if constexpr (kKind == kK3 || kKind == kK3Plus) return vmin(Number(kMaxK3), exp_minus_1_minus(clamped_log_ratio(d)));
    else return d;
  }

  template <class Number>
  FASTPPO_SHARED static Number slope(const Number& d) {
    if constexpr (kKind == kK1) return Number(1.0f);
    else if constexpr (kKind == kAbs) return select(d < 0.0f, Number(-1.0f), select(d > 0.0f, Number(1.0f), Number(0.0f)));
    else if constexpr (kKind == kK3) {
      // u = -d: dk3/dd = 1 - exp(u), and 0 where a clamp holds; NaN is no clamp.
      const Number u = clamped_log_ratio(d), k3 = exp_minus_1_minus(u);
      const Condition<Number> held = outside(d, -kMaxLogRatio, kMaxLogRatio) | (k3 > kMaxK3);
      return select(held, Number(0.0f), -(k3 + u));
    } else return d;  // k2's, and that of the straight-through forms
  }
};

// Calls body with the estimator that `kind` names, and returns what it returns.
FASTPPO_CALLS_ANY
template <class Body>
FASTPPO_SHARED auto with_kl(KLKind kind, const Body& body) {
  switch (kind) {
    case kK1: return body(Kl<kK1>{});
    case kK2: return body(Kl<kK2>{});
    case kK3: return body(Kl<kK3>{});
    case kAbs: return body(Kl<kAbs>{});
    case kK1Plus: return body(Kl<kK1Plus>{});
    default: return body(Kl<kK3Plus>{});
  }
}

}  // namespace fastppo
