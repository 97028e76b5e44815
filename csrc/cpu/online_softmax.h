// The log-sum-exp of one row, read once from memory: the only such loop on the CPU, shared by every op that needs one.
#pragma once

#include <cmath>
#include <type_traits>

#include "simd.h"

namespace fastppo::FASTPPO_ISA {

constexpr float kInfinity = __builtin_inff();
constexpr int64_t kSoftmaxBlock = 1024;  // 4 KiB of fp32: the second look at a block comes from L1

// Divided, not multiplied by a rounded 1 / temperature: at z = 20 that alone would cost p twenty times fp32's epsilon.
template <bool kSoftcap>
FASTPPO_INLINE vfloat apply_transform(const vfloat& x, const LogitTransform& t) {
  vfloat z = x * t.scale;
  if (kSoftcap) z = t.softcap * vtanh(z / t.softcap);
  return t.temperature == 1.0f ? z : z / t.temperature;
}

FASTPPO_INLINE float transform_scalar(float x, const LogitTransform& t) {
  return t.softcap > 0 ? apply_transform<true>(x, t)[0] : apply_transform<false>(x, t)[0];
}

// The sum is kept without the largest element's own term, which is 1: beside it the others would lose their digits where they are small, and with
// them the log-prob, 1 - p and the entropy of a token that is nearly certain.
struct SoftmaxStats {
  float max = -kInfinity;  // m, the largest z
  double rest = -1;        // sum exp(z - m) - 1: the sum over all elements but one that is the largest; -1 where there is none yet
  double weighted = 0;     // sum exp(z - m) * (z - m), for the entropy
  double log_sum() const { return std::log1p(rest); }
  float entropy() const { return static_cast<float>(log_sum() - weighted / (1 + rest)); }
};

// Transforms `size` <= kSoftmaxBlock elements into z and returns each lane's largest. NaN may hide from the maximum, never from the sums.
template <class Storage, bool kSoftcap>
FASTPPO_INLINE vfloat load_block(const typename Storage::type* x, int size, const LogitTransform& t, vfloat* z) {
  vfloat block_max = -kInfinity;
  const int whole = size / kLanes, rest = size % kLanes;
  for (int i = 0; i < whole; ++i) {
    z[i] = apply_transform<kSoftcap>(Storage::load(x + i * kLanes), t);
    block_max = vmax(block_max, z[i]);
  }
  if (rest) {
    // The tail's spare lanes become -inf after the transform: exp(-inf) = 0 adds nothing, whatever the width.
    z[whole] = apply_transform<kSoftcap>(load_tail<Storage>(x + whole * kLanes, rest, 0), t);
    for (int lane = rest; lane < kLanes; ++lane) z[whole].set(lane, -kInfinity);
    block_max = vmax(block_max, z[whole]);
  }
  return block_max;
}

// What row_softmax tells of each block, for a caller that needs more than the sums; this one wants nothing.
struct Unobserved {
  static constexpr bool kWanted = false;
  // Block number, its vectors, each lane's largest z, the maximum so far m, exp(z - m).
  void operator()(int64_t, int, const vfloat&, float, const vfloat*) const {}
};

// One element of a block.
struct BlockPlace {
  int vector, lane;
};

// Where the block's maximum `top` stands: the first of its elements in the first lane that has one.
FASTPPO_INLINE BlockPlace find_top(const vfloat* z, const vfloat& lane_max, float top) {
  BlockPlace place{0, __builtin_ctz(lane_bits(lane_max == top))};
  while (z[place.vector][place.lane] != top) ++place.vector;
  return place;
}

// Adds a row, or the next piece of one, to `stats`. Online form (Milakov and Gimelshein 2018) over blocks: block maximum, one rescale when it rises,
// then the block's sums. Pieces that begin at multiples of kSoftmaxBlock give the bits of the whole row.
template <class Storage, bool kEntropy, bool kSoftcap, class Observer = Unobserved>
FASTPPO_INLINE void add_to_softmax(SoftmaxStats& stats, const typename Storage::type* row, int64_t width, const LogitTransform& t, Observer&& observe = {}) {
  vfloat z[kSoftmaxBlock / kLanes];
  for (int64_t begin = 0; begin < width; begin += kSoftmaxBlock) {
    const int size = static_cast<int>(width - begin < kSoftmaxBlock ? width - begin : kSoftmaxBlock);
    const int vectors = (size + kLanes - 1) / kLanes;
    const vfloat lane_max = load_block<Storage, kSoftcap>(row + begin, size, t, z);
    const float top = max_lanes(lane_max);
    const bool rises = top > stats.max;
    BlockPlace place{};
    if (rises) {
      const double shift = static_cast<double>(stats.max) - top;
      const double factor = stats.max == -kInfinity ? 0.0 : std::exp(shift);
      stats.weighted = factor == 0.0 ? 0.0 : factor * (stats.weighted + shift * (stats.rest + 1));
      stats.rest = factor * (stats.rest + 1);
      stats.max = top;
      place = find_top(z, lane_max, top);
      if (top != kInfinity) z[place.vector].set(place.lane, -kInfinity);  // left out of the sum; +inf stays, for inf - inf = NaN has to show
    }
    // While all is -inf, any finite shift keeps -inf - shift = -inf: a block of -inf adds 0, and a NaN still shows.
    const float shift = stats.max == -kInfinity ? 0 : stats.max;
    vfloat sum = 0.0f, weighted = 0.0f;
    const auto* next = row + begin + kSoftmaxBlock;  // fetched while this block's exponentials keep the cores busy
    for (int i = 0; i < vectors; ++i) {
      __builtin_prefetch(next + i * kLanes);
      const vfloat shifted = z[i] - shift;
      const vfloat e = vexp_nonpositive(shifted);
      sum += e;
      if (kEntropy) weighted += select(e == 0.0f, vfloat(0.0f), e * shifted);  // 0 * -inf is 0 here
      if (std::decay_t<Observer>::kWanted) z[i] = e;
    }
    if (std::decay_t<Observer>::kWanted && rises) z[place.vector].set(place.lane, 1);
    observe(begin / kSoftmaxBlock, vectors, lane_max, stats.max, z);
    stats.rest += sum_lanes(sum);
    if (kEntropy) stats.weighted += sum_lanes(weighted);
  }
}

template <class Storage, bool kEntropy, bool kSoftcap, class Observer = Unobserved>
FASTPPO_INLINE SoftmaxStats row_softmax(const typename Storage::type* row, int64_t width, const LogitTransform& t, Observer&& observe = {}) {
  SoftmaxStats stats;
  add_to_softmax<Storage, kEntropy, kSoftcap>(stats, row, width, t, observe);
  // As in torch: NaN anywhere, a +inf, or nothing but -inf leaves no distribution.
  if (stats.max == kInfinity || stats.max == -kInfinity) stats.rest = stats.weighted = __builtin_nan("");
  return stats;
}

template <class Storage>
FASTPPO_INLINE void add_to_softmax(SoftmaxStats& stats, const typename Storage::type* row, int64_t width, const LogitTransform& t, bool entropy) {
  if (t.softcap > 0) add_to_softmax<Storage, true, true>(stats, row, width, t);
  else if (entropy) add_to_softmax<Storage, true, false>(stats, row, width, t);
  else add_to_softmax<Storage, false, false>(stats, row, width, t);
}

template <class Storage>
FASTPPO_INLINE SoftmaxStats row_softmax(const typename Storage::type* row, int64_t width, const LogitTransform& t, bool entropy) {
  if (t.softcap > 0) return row_softmax<Storage, true, true>(row, width, t);
  return entropy ? row_softmax<Storage, true, false>(row, width, t) : row_softmax<Storage, false, false>(row, width, t);
}

}  // namespace fastppo::FASTPPO_ISA
