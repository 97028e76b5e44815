// How many, mean and variance of sets of numbers. One copy for every device. Formulas: fastppo/reference/masked_whiten.py.
#pragma once

#include <cmath>

#include "../ops.h"
#include "number.h"

namespace fastppo {

constexpr double kVarianceFloor = 1e-8;

// Of both sets together. Chan, Golub and LeVeque 1979: no difference of large sums, so a large mean costs no digits. Infinite means have no difference
// to go by: their own sum has the infinity, or the NaN, of all elements' sum.
FASTPPO_SHARED Moments merge(const Moments& a, const Moments& b) {
  if (b.count == 0) return a;
  if (a.count == 0) return b;
  const double count = a.count + b.count, delta = b.mean - a.mean, share = b.count / count;
  const bool finite = delta - delta == 0;
  return {count, finite ? a.mean + delta * share : a.mean + b.mean, a.squares + b.squares + delta * delta * (a.count * share)};
}

// Of numbers whose sums of d = x - pivot and d^2 these are. The pivot is one of them: its own square bounds what the difference of the sums can lose, and
// equal numbers give exactly 0.
FASTPPO_SHARED Moments moments_around(double pivot, double count, double sum, double squares) {
  if (count == 0) return {0, 0, 0};
  return {count, pivot + sum / count, squares - sum * (sum / count)};
}

// An infinite number is no pivot, from which it would have no distance: 0 is.
FASTPPO_SHARED float pivot_of(float x) { return x - x == 0 || x != x ? x : 0.0f; }

// 1 / standard deviation, with Bessel's correction.
FASTPPO_SHARED double whitening_scale(const Moments& moments) {
  const double variance = moments.count > 1 ? moments.squares / (moments.count - 1) : 0;
  return 1 / sqrt(variance + kVarianceFloor);
}

}  // namespace fastppo
