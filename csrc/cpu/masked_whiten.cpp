// Mean and variance of the masked elements in one read, and the whitened tensor in one more. Sums are doubles over blocks of fixed size, added in
// order: the bits depend neither on threads nor on the instruction set.
#include <algorithm>
#include <vector>

#include "../common/moments.h"
#include "masks.h"
#include "parallel.h"

namespace fastppo::FASTPPO_ISA {
namespace {

constexpr int64_t kBlock = 1024;
constexpr int64_t kBlocksWorthAThread = 16;

// Sixteen doubles, as four registers of AVX: of all widths the one that GCC converts from and to floats without detours.
struct Doubles {
  typedef double Four __attribute__((vector_size(32)));
  typedef float FourFloats __attribute__((vector_size(16)));
  static constexpr int kParts = 4;
  Four part[kParts] = {};

  FASTPPO_MEMBER static Doubles from(const vfloat& x) {
    Doubles d;
    FourFloats floats[kParts];
    std::memcpy(floats, &x, sizeof x);
    for (int i = 0; i < kParts; ++i) d.part[i] = __builtin_convertvector(floats[i], Four);
    return d;
  }
  FASTPPO_MEMBER vfloat rounded() const {
    FourFloats floats[kParts];
    for (int i = 0; i < kParts; ++i) floats[i] = __builtin_convertvector(part[i], FourFloats);
    return F32::load(reinterpret_cast<const float*>(floats));
  }
  // Folded in halves: the order of additions is fixed.
  FASTPPO_MEMBER double total() const {
    const Four sum = (part[0] + part[2]) + (part[1] + part[3]);
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
  }
};

struct Kept {
  vint keep;
  vfloat x;  // `absent` where not kept
};

FASTPPO_INLINE Kept load_kept(const float* x, const uint8_t* mask, int count, float absent) {
  const vint keep = load_mask(mask, count);
  return {keep, select(keep, load(x, count), vfloat(absent))};
}

// Elements left out are set to the pivot.
Moments block_moments(const float* x, const uint8_t* mask, int size) {
  int first = 0;
  while (mask && first < size && !mask[first]) ++first;
  if (first == size) return {};
  const float pivot = pivot_of(x[first]);
  vfloat counts = 0.0f;
  Doubles sums, squares;
  for_vectors(0, size, [&](int64_t i, int lanes) {
    const Kept k = load_kept(x + i, mask ? mask + i : nullptr, lanes, pivot);
    counts += select(k.keep, vfloat(1.0f), vfloat(0.0f));
    const Doubles x16 = Doubles::from(k.x);
    for (int j = 0; j < Doubles::kParts; ++j) {
      const Doubles::Four d = x16.part[j] - static_cast<double>(pivot);
      sums.part[j] += d;
      squares.part[j] += d * d;
    }
  });
  return moments_around(pivot, sum_lanes(counts), sums.total(), squares.total());
}

void whiten_range(const float* x, const uint8_t* mask, double mean, double scale, double shift, float* out, int64_t first, int64_t last) {
  for_vectors(first, last, [&](int64_t i, int count) {
    const Kept k = load_kept(x + i, mask ? mask + i : nullptr, count, 0);
    Doubles v = Doubles::from(k.x);
    for (Doubles::Four& part : v.part) part = (part - mean) * scale + shift;
    store(out + i, count, select(k.keep, v.rounded(), vfloat(0.0f)));
  });
}

}  // namespace

Moments masked_moments(const float* x, const uint8_t* mask, int64_t count, int threads) {
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  std::vector<Moments> partial(blocks);
  parallel_ranges(blocks, threads, kBlocksWorthAThread, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = b * kBlock;
      partial[b] = block_moments(x + begin, mask ? mask + begin : nullptr, static_cast<int>(count - begin < kBlock ? count - begin : kBlock));
    }
  });
  Moments all{};
  for (const Moments& block : partial) all = merge(all, block);
  return all;
}

void masked_whiten(const float* x, const uint8_t* mask, int64_t count, Moments moments, bool keep_mean, float* out, int threads) {
  const double scale = whitening_scale(moments), shift = keep_mean ? moments.mean : 0;
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  parallel_ranges(blocks, threads, kBlocksWorthAThread, [&](int64_t first, int64_t last) {
    whiten_range(x, mask, moments.mean, scale, shift, out, first * kBlock, std::min(last * kBlock, count));
  });
}

}  // namespace fastppo::FASTPPO_ISA
