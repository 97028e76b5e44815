// What the choice of a token is made of, in scalars, written once for the CPU's and the GPU's kernels: both have to come to the same bits.
// fastppo/reference/sample_tokens.py is the specification.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FASTPPO_SCALAR static inline __host__ __device__
#else
#define FASTPPO_SCALAR static inline
#endif

namespace fastppo {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // ln 2 in two parts (Cody and Waite): n * kLn2High is exact
constexpr float kShifter = 12582912.0f;                              // 1.5 * 2^23: adding it rounds to the nearest integer
constexpr float kExpUnderflow = -87.3f;                              // below, exp counts as 0
// Cephes' expf: exp(r) = 1 + r + r^2 P(r) for |r| <= ln 2 / 2, highest power first.
constexpr float kExp5 = 1.9875691500e-4f, kExp4 = 1.3981999507e-3f, kExp3 = 8.3334519073e-3f, kExp2 = 4.1665795894e-2f,
                kExp1 = 1.6666665459e-1f, kExp0 = 5.0000001201e-1f;

constexpr double kMassScale = 0x1p40;

// nvcc may not fuse these into multiply-adds, which round once where two operations round twice.
#if defined(__CUDA_ARCH__)
FASTPPO_SCALAR float rounded_sum(float a, float b) { return __fadd_rn(a, b); }
FASTPPO_SCALAR float rounded_product(float a, float b) { return __fmul_rn(a, b); }
// c - a * b where the product is exact: fused or not, it rounds once.
FASTPPO_SCALAR float minus_exact_product(float c, float a, float b) { return fmaf(-a, b, c); }
#else
FASTPPO_SCALAR float rounded_sum(float a, float b) { return a + b; }
FASTPPO_SCALAR float rounded_product(float a, float b) { return a * b; }
FASTPPO_SCALAR float minus_exact_product(float c, float a, float b) { return c - a * b; }
#endif

template <class To, class From>
FASTPPO_SCALAR To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "bits are neither lost nor added");
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

// One lane of csrc/cpu/simd.h's vexp_nonpositive, its very operations.
FASTPPO_SCALAR float exp_nonpositive(float x) {
  const float shifted = rounded_sum(rounded_product(x, kLog2E), kShifter);
  const float n = rounded_sum(shifted, -kShifter);
  const float r = rounded_sum(minus_exact_product(x, n, kLn2High), -rounded_product(n, kLn2Low));
  float poly = rounded_sum(rounded_product(kExp5, r), kExp4);
  poly = rounded_sum(rounded_product(poly, r), kExp3);
  poly = rounded_sum(rounded_product(poly, r), kExp2);
  poly = rounded_sum(rounded_product(poly, r), kExp1);
  poly = rounded_sum(rounded_product(poly, r), kExp0);
  const float mantissa = rounded_sum(rounded_sum(rounded_product(poly, rounded_product(r, r)), r), 1.0f);
  const float e = same_bits<float>(same_bits<uint32_t>(mantissa) + (same_bits<uint32_t>(shifted) << 23));
  return x < kExpUnderflow ? 0.0f : e;
}

// A double near 2^12 has a last place of 2^-40: adding 2^12 to e <= 1 rounds e to a multiple of 2^-40 (to even), and the sum's bits count them.
constexpr double kMassShifter = 0x1p12;
constexpr uint64_t kMassShifterBits = 0x40b0000000000000;

// round(e * 2^40)
FASTPPO_SCALAR uint64_t mass_of(float e) { return same_bits<uint64_t>(static_cast<double>(e) + kMassShifter) - kMassShifterBits; }

// Philox4x32-10 (Salmon et al. 2011): key = seed, counter = (position, sequence id); the first two words of its output, low one first.
FASTPPO_SCALAR uint64_t philox(uint64_t seed, uint64_t sequence_id, uint64_t position) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(position >> 32);
  uint32_t c2 = static_cast<uint32_t>(sequence_id), c3 = static_cast<uint32_t>(sequence_id >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * c0, product1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return c0 | static_cast<uint64_t>(c1) << 32;
}

FASTPPO_SCALAR uint64_t multiply_high(uint64_t a, uint64_t b) { return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64); }

// ceil(top_p * total), top_p rounded to a multiple of 2^-31; at least 1, so that the largest logit always stays.
FASTPPO_SCALAR uint64_t top_p_mass(float top_p, uint64_t total) {
  const uint64_t share = static_cast<uint64_t>(nearbyint(top_p * 0x1p31));
  const auto product = static_cast<unsigned __int128>(share) * total + ((uint64_t{1} << 31) - 1);
  const uint64_t mass = static_cast<uint64_t>(product >> 31);
  return mass < 1 ? 1 : mass;
}

// Unsigned integers in the order of their floats, and back; -0 equals 0.
FASTPPO_SCALAR uint32_t order_key(float z) {
  const uint32_t bits = same_bits<uint32_t>(rounded_sum(z, 0.0f));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

FASTPPO_SCALAR float from_order_key(uint32_t key) { return same_bits<float>(key & 0x80000000u ? key ^ 0x80000000u : ~key); }

// One row's parameters; out of range, the row is an error row.
struct RowParameters {
  float temperature;
  int64_t top_k;
  float top_p, min_p;
  uint64_t uniform;
};

FASTPPO_SCALAR bool valid(const RowParameters& p) {
  return p.temperature >= 0 && p.temperature < __builtin_inff() && p.top_k >= 0 && p.top_p >= 0 && p.top_p <= 1 && p.min_p >= 0 && p.min_p <= 1;
}

// What temperature 0, the greedy choice, gives log-probs at.
FASTPPO_SCALAR float divisor(const RowParameters& p) { return p.temperature == 0 ? 1.0f : p.temperature; }

FASTPPO_SCALAR bool has_top_k(const RowParameters& p, int64_t width) { return p.top_k > 0 && p.top_k < width; }

FASTPPO_SCALAR bool has_filters(const RowParameters& p, int64_t width) { return has_top_k(p, width) || p.top_p < 1 || p.min_p > 0; }

// A z that no token below needs looking at, for the row's `total` mass. At 2^-42 and below there is no mass, min-p keeps less than nothing, and
// where all tokens of mass <= c weigh, as they weigh <= width * c together, no more than total - needed, top-p stops above them; with top-k it counts
// in another total. e^-0.001 is room for the rounding of exp and of z - max, and the bound is rounded down.
FASTPPO_SCALAR float least_kept(const RowParameters& p, float max, uint64_t total, int64_t width) {
  double least = 0x1p-42;
  if (!has_top_k(p, width)) {
    const double spare = static_cast<double>((total - top_p_mass(p.top_p, total)) / static_cast<uint64_t>(width)) / kMassScale;
    least = fmax(least, fmax(spare, static_cast<double>(p.min_p)));
  }
  return nextafterf(static_cast<float>(max + log(least) - 1e-3), -__builtin_inff());
}

}  // namespace fastppo
