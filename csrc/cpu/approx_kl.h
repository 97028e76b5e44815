// Estimators of KL(policy || reference) from d = logprob - ref_logprob of a sampled token, and their slopes d kl / d logprob.
// One copy for every op that needs them. Formulas: fastppo/reference/approx_kl.py.
#pragma once

#include "simd.h"

namespace fastppo::FASTPPO_ISA {

constexpr float kMaxLogRatio = 20, kMaxK3 = 10;

// exp(u) - 1 - u; a Taylor series near 0, where the difference would cancel.
FASTPPO_INLINE vfloat exp_minus_1_minus(const vfloat& u) {
  vfloat series = vfloat(1.0f / 40320) * u + 1.0f / 5040;
  series = series * u + 1.0f / 720;
  series = series * u + 1.0f / 120;
  series = series * u + 1.0f / 24;
  series = series * u + 1.0f / 6;
  series = series * u + 0.5f;
  const vint near_zero = (u > -0.35f) & (u < 0.35f);
  return select(near_zero, series * (u * u), (vexp(u) - 1.0f) - u);
}

FASTPPO_INLINE vfloat clamped_log_ratio(const vfloat& d) { return vmin(vfloat(kMaxLogRatio), vmax(vfloat(-kMaxLogRatio), -d)); }

template <KLKind kKind>
FASTPPO_INLINE vfloat kl_value(const vfloat& d) {
  if (kKind == kK2) return 0.5f * (d * d);
  if (kKind == kAbs) return select(d < 0.0f, -d, d);
  if (kKind == kK3 || kKind == kK3Plus) return vmin(vfloat(kMaxK3), exp_minus_1_minus(clamped_log_ratio(d)));
  return d;
}

template <KLKind kKind>
FASTPPO_INLINE vfloat kl_slope(const vfloat& d) {
  if (kKind == kK1) return vfloat(1.0f);
  if (kKind == kAbs) return select(d < 0.0f, vfloat(-1.0f), select(d > 0.0f, vfloat(1.0f), vfloat(0.0f)));
  if (kKind == kK3) {
    // u = -d: dk3/dd = 1 - exp(u), and 0 where a clamp holds; NaN is no clamp.
    const vfloat u = clamped_log_ratio(d), k3 = exp_minus_1_minus(u);
    const vint held = (d > kMaxLogRatio) | (d < -kMaxLogRatio) | (k3 > kMaxK3);
    return select(held, vfloat(0.0f), -(k3 + u));
  }
  return d;  // k2's, and that of the straight-through forms
}

template <KLKind kKind>
struct Kl {
  FASTPPO_INLINE vfloat value(const vfloat& d) { return kl_value<kKind>(d); }
  FASTPPO_INLINE vfloat slope(const vfloat& d) { return kl_slope<kKind>(d); }
};

// Calls body(kl) with the estimator that `kind` names.
template <class Body>
FASTPPO_INLINE void with_kl(KLKind kind, const Body& body) {
  switch (kind) {
    case kK1: return body(Kl<kK1>{});
    case kK2: return body(Kl<kK2>{});
    case kK3: return body(Kl<kK3>{});
    case kAbs: return body(Kl<kAbs>{});
    case kK1Plus: return body(Kl<kK1Plus>{});
    case kK3Plus: return body(Kl<kK3Plus>{});
  }
}

}  // namespace fastppo::FASTPPO_ISA
