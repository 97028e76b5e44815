// Sixteen-lane vectors for the CPU kernels, written once for every instruction set.
//
// A vector is one AVX-512, two AVX2 or four SSE/NEON registers. Because the logical width is always 16 and the build switches floating-point
// contraction off, every instruction set gives the same bits: a sample or a loss does not depend on which machine computed it.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../common/number.h"
#include "../ops.h"
#include "../sampling_math.h"

#define FASTPPO_INLINE static inline __attribute__((always_inline))
#define FASTPPO_MEMBER inline __attribute__((always_inline))

namespace fastppo::FASTPPO_ISA {

constexpr int kLanes = 16;
#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif
constexpr int kPartLanes = kRegisterBytes / 4;  // of a vector in one register

// Sixteen elements of a 4-byte type T in as many registers as that takes. GCC's own 64-byte vectors would do, but it splits their comparisons
// into scalars where the machine has narrower registers.
template <class T>
struct Vec {
  static constexpr int kParts = 64 / kRegisterBytes;
  typedef T Register __attribute__((vector_size(kRegisterBytes)));
  Register part[kParts];

  Vec() = default;
  FASTPPO_MEMBER Vec(T x) {  // implicit: a scalar stands for sixteen of itself
    for (Register& r : part) r = broadcast(x);
  }
  FASTPPO_MEMBER static Register broadcast(T x) {
#if defined(__AVX512F__)  // one instruction: 0 + x, of which GCC makes the others, would be two of a float
    if constexpr (std::is_same_v<T, float>) return _mm512_set1_ps(x);
#elif defined(__AVX2__)
    if constexpr (std::is_same_v<T, float>) return _mm256_set1_ps(x);
#endif
    return Register{} + x;
  }
  FASTPPO_MEMBER T operator[](int lane) const {
    T x;
    std::memcpy(&x, reinterpret_cast<const char*>(part) + lane * sizeof(T), sizeof(T));
    return x;
  }
  FASTPPO_MEMBER void set(int lane, T x) { std::memcpy(reinterpret_cast<char*>(part) + lane * sizeof(T), &x, sizeof(T)); }
  FASTPPO_MEMBER Vec operator-() const {
    Vec out;
    for (int i = 0; i < kParts; ++i) out.part[i] = -part[i];
    return out;
  }
};

using vfloat = Vec<float>;
using vint = Vec<int32_t>;
using vuint = Vec<uint32_t>;

#define FASTPPO_BINARY(op)                                                                     \
  template <class T>                                                                           \
  FASTPPO_INLINE Vec<T> operator op(const Vec<T>& a, const Vec<T>& b) {                        \
    Vec<T> out;                                                                                \
    for (int i = 0; i < Vec<T>::kParts; ++i) out.part[i] = a.part[i] op b.part[i];             \
    return out;                                                                                \
  }                                                                                            \
  template <class T>                                                                           \
  FASTPPO_INLINE Vec<T> operator op(const Vec<T>& a, decltype(T{}) b) {                        \
    return a op Vec<T>(b);                                                                     \
  }                                                                                            \
  template <class T>                                                                           \
  FASTPPO_INLINE Vec<T> operator op(decltype(T{}) a, const Vec<T>& b) {                        \
    return Vec<T>(a) op b;                                                                     \
  }                                                                                            \
  template <class T, class U>                                                                  \
  FASTPPO_INLINE Vec<T>& operator op##=(Vec<T>& a, const U& b) {                               \
    return a = a op b;                                                                         \
  }
FASTPPO_BINARY(+)
FASTPPO_BINARY(-)
FASTPPO_BINARY(*)
FASTPPO_BINARY(/)
FASTPPO_BINARY(&)
FASTPPO_BINARY(|)
FASTPPO_BINARY(^)
#undef FASTPPO_BINARY

// Comparisons give masks: all bits of a lane set where true.
#define FASTPPO_COMPARE(op)                                                                                  \
  template <class T>                                                                                         \
  FASTPPO_INLINE vint operator op(const Vec<T>& a, const Vec<T>& b) {                                        \
    vint out;                                                                                                \
    for (int i = 0; i < vint::kParts; ++i) out.part[i] = reinterpret_cast<vint::Register>(a.part[i] op b.part[i]); \
    return out;                                                                                              \
  }                                                                                                          \
  template <class T>                                                                                         \
  FASTPPO_INLINE vint operator op(const Vec<T>& a, decltype(T{}) b) {                                        \
    return a op Vec<T>(b);                                                                                   \
  }
FASTPPO_COMPARE(<)
FASTPPO_COMPARE(<=)
FASTPPO_COMPARE(>)
FASTPPO_COMPARE(>=)
FASTPPO_COMPARE(==)
FASTPPO_COMPARE(!=)
#undef FASTPPO_COMPARE

template <class T>
FASTPPO_INLINE Vec<T> operator<<(const Vec<T>& a, int bits) {
  Vec<T> out;
  for (int i = 0; i < Vec<T>::kParts; ++i) out.part[i] = a.part[i] << bits;
  return out;
}

template <class T>
FASTPPO_INLINE Vec<T> operator>>(const Vec<T>& a, int bits) {
  Vec<T> out;
  for (int i = 0; i < Vec<T>::kParts; ++i) out.part[i] = a.part[i] >> bits;
  return out;
}

template <class T>
FASTPPO_INLINE Vec<T> select(const vint& mask, const Vec<T>& yes, const Vec<T>& no) {
  Vec<T> out;
  for (int i = 0; i < Vec<T>::kParts; ++i) out.part[i] = mask.part[i] ? yes.part[i] : no.part[i];
  return out;
}

// The same bits under another type.
template <class To, class From>
FASTPPO_INLINE Vec<To> bit_cast(const Vec<From>& a) {
  Vec<To> out;
  for (int i = 0; i < Vec<To>::kParts; ++i) out.part[i] = reinterpret_cast<typename Vec<To>::Register>(a.part[i]);
  return out;
}

// Bit i is set where lane i of a comparison is true.
FASTPPO_INLINE uint32_t lane_bits(const vint& mask) {
  uint32_t bits = 0;
  for (int i = 0; i < vint::kParts; ++i) {
#if defined(__AVX512F__)
    bits = _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask.part[i]));
#elif defined(__AVX2__)
    bits |= static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask.part[i]))) << (8 * i);
#elif defined(__SSE2__)
    bits |= static_cast<uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(mask.part[i]))) << (4 * i);
#else
    for (int j = 0; j < kRegisterBytes / 4; ++j) bits |= (mask.part[i][j] & 1u) << (kRegisterBytes / 4 * i + j);
#endif
  }
  return bits;
}

// a * b + c, rounded once where the machine can (AVX2 and AVX-512 alike), twice where it cannot.
FASTPPO_INLINE vfloat::Register fma(const vfloat::Register& a, const vfloat::Register& b, const vfloat::Register& c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

FASTPPO_INLINE vfloat fma(const vfloat& a, const vfloat& b, const vfloat& c) {
  vfloat out;
  for (int i = 0; i < vfloat::kParts; ++i) out.part[i] = fma(a.part[i], b.part[i], c.part[i]);
  return out;
}

// The larger (smaller) of two; where one is NaN, b.
FASTPPO_INLINE vfloat vmax(const vfloat& a, const vfloat& b) { return select(a > b, a, b); }
FASTPPO_INLINE vfloat vmin(const vfloat& a, const vfloat& b) { return select(a < b, a, b); }

FASTPPO_INLINE float half_to_float(uint16_t h) {
  _Float16 x;
  std::memcpy(&x, &h, sizeof x);
  return static_cast<float>(x);
}

FASTPPO_INLINE uint16_t float_to_half(float f) {
  _Float16 x = static_cast<_Float16>(f);
  uint16_t h;
  std::memcpy(&h, &x, sizeof h);
  return h;
}

template <class Storage>
FASTPPO_INLINE vfloat load_parts(const typename Storage::type* p) {
  vfloat v;
  for (int i = 0; i < vfloat::kParts; ++i) v.part[i] = Storage::load_part(p + i * kPartLanes);
  return v;
}

// One storage type each: how 16 consecutive elements, or as many as one register holds, become floats and back (round to nearest even).
struct F32 {
  using type = float;
  FASTPPO_INLINE float load_one(const float* p) { return *p; }
  FASTPPO_INLINE void store_one(float* p, float x) { *p = x; }
  FASTPPO_INLINE vfloat::Register load_part(const float* p) {
    vfloat::Register part;
    std::memcpy(&part, p, sizeof part);
    return part;
  }
  // Register by register: GCC would move all 64 bytes through the stack, in pieces smaller than a register.
  FASTPPO_INLINE vfloat load(const float* p) { return load_parts<F32>(p); }
  FASTPPO_INLINE void store(float* p, const vfloat& v) {
    for (int i = 0; i < vfloat::kParts; ++i) std::memcpy(p + i * kPartLanes, &v.part[i], kRegisterBytes);
  }
};

struct BF16 {
  using type = uint16_t;
  FASTPPO_INLINE float load_one(const uint16_t* p) {
    const uint32_t bits = static_cast<uint32_t>(*p) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
  FASTPPO_INLINE void store_one(uint16_t* p, float x) {
    uint16_t lanes[kLanes];
    store(lanes, x);
    *p = lanes[0];
  }
  typedef uint16_t Half __attribute__((vector_size(kRegisterBytes / 2)));  // as many elements as one register of floats
  FASTPPO_INLINE vfloat::Register load_part(const uint16_t* p) {
    Half h;
    std::memcpy(&h, p, sizeof h);
    return reinterpret_cast<vfloat::Register>(__builtin_convertvector(h, vuint::Register) << 16);
  }
  FASTPPO_INLINE vfloat load(const uint16_t* p) { return load_parts<BF16>(p); }
  FASTPPO_INLINE void store(uint16_t* p, const vfloat& v) {
    const vuint bits = bit_cast<uint32_t>(v);
    const vuint rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const vuint out = select(v != v, (bits >> 16) | 0x40u, rounded);  // a NaN stays a quiet NaN
    for (int i = 0; i < vuint::kParts; ++i) {
      const Half h = __builtin_convertvector(out.part[i], Half);
      std::memcpy(p + i * kPartLanes, &h, sizeof h);
    }
  }
};

struct F16 {
  using type = uint16_t;
  FASTPPO_INLINE float load_one(const uint16_t* p) { return half_to_float(*p); }
  FASTPPO_INLINE void store_one(uint16_t* p, float x) { *p = float_to_half(x); }
  FASTPPO_INLINE vfloat::Register load_part(const uint16_t* p) {
#if defined(__AVX512F__)
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    vfloat::Register part;
    for (int i = 0; i < kLanes / vfloat::kParts; ++i) part[i] = half_to_float(p[i]);
    return part;
#endif
  }
  FASTPPO_INLINE vfloat load(const uint16_t* p) { return load_parts<F16>(p); }
  FASTPPO_INLINE void store(uint16_t* p, const vfloat& v) {
#if defined(__F16C__)
    __m256 low, high;
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(v[i]);
#endif
  }
};

#if defined(__AVX2__)
FASTPPO_INLINE __m256 load_eight(F32, const float* p) { return _mm256_loadu_ps(p); }
FASTPPO_INLINE __m256 load_eight(BF16, const uint16_t* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
FASTPPO_INLINE __m256 load_eight(F16, const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

// Eight rows `stride` apart, eight elements each -> out[i]: element i of every row.
template <class Storage>
FASTPPO_INLINE void transpose_eight(const typename Storage::type* p, int64_t stride, __m256 (&out)[8]) {
  __m256 row[8], pair[8], quad[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) row[i] = load_eight(Storage{}, p + i * stride);
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      quad[i + 2 * j] = _mm256_shuffle_ps(pair[i + j], pair[i + j + 2], _MM_SHUFFLE(1, 0, 1, 0));
      quad[i + 2 * j + 1] = _mm256_shuffle_ps(pair[i + j], pair[i + j + 2], _MM_SHUFFLE(3, 2, 3, 2));
    }
  for (int i = 0; i < 4; ++i) {
    out[i] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20);
    out[i + 4] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31);
  }
}
#endif

// from [rows, columns] -> to [columns, rows].
FASTPPO_INLINE void transpose(const float* from, int64_t rows, int64_t columns, float* to) {
  int64_t row = 0;
#if defined(__AVX2__)
  const int64_t eights = columns / 8 * 8;
  for (; row + 8 <= rows; row += 8) {
    for (int64_t column = 0; column < eights; column += 8) {
      __m256 lines[8];
      transpose_eight<F32>(from + row * columns + column, columns, lines);
      for (int n = 0; n < 8; ++n) _mm256_storeu_ps(to + (column + n) * rows + row, lines[n]);
    }
    for (int64_t column = eights; column < columns; ++column)
      for (int n = 0; n < 8; ++n) to[column * rows + row + n] = from[(row + n) * columns + column];
  }
#endif
  for (; row < rows; ++row)
    for (int64_t column = 0; column < columns; ++column) to[column * rows + row] = from[row * columns + column];
}

// Calls body(storage) with the storage type that `dtype` names.
template <class Body>
FASTPPO_INLINE void with_storage(DType dtype, const Body& body) {
  if (dtype == kFloat32) body(F32{});
  else if (dtype == kBFloat16) body(BF16{});
  else body(F16{});
}

FASTPPO_INLINE vint lane_numbers() {
  static constexpr int32_t kNumbers[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  vint v;
  std::memcpy(&v, kNumbers, sizeof v);
  return v;
}

#if defined(__AVX2__)
// Lanes outside of the mask are 0 (kept), and their memory is not touched.
FASTPPO_INLINE vfloat load_masked(const float* p, const vint& mask) {
  vfloat v;
#if defined(__AVX512F__)
  v.part[0] = _mm512_maskz_loadu_ps(static_cast<__mmask16>(lane_bits(mask)), p);
#else
  for (int i = 0; i < vfloat::kParts; ++i) v.part[i] = _mm256_maskload_ps(p + 8 * i, reinterpret_cast<__m256i>(mask.part[i]));
#endif
  return v;
}

FASTPPO_INLINE void store_masked(float* p, const vint& mask, const vfloat& v) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>(lane_bits(mask)), v.part[0]);
#else
  for (int i = 0; i < vfloat::kParts; ++i) _mm256_maskstore_ps(p + 8 * i, reinterpret_cast<__m256i>(mask.part[i]), v.part[i]);
#endif
}
#endif

// The last `count` < 16 elements of a row: lanes beyond hold `fill`, and memory beyond is neither read nor written.
template <class Storage>
FASTPPO_INLINE vfloat load_tail(const typename Storage::type* p, int count, float fill) {
  const vint outside = lane_numbers() >= count;
#if defined(__AVX2__)
  if constexpr (std::is_same_v<Storage, F32>) return select(outside, vfloat(fill), load_masked(p, lane_numbers() < count));
#endif
  typename Storage::type buffer[kLanes] = {};
  std::memcpy(buffer, p, count * sizeof *p);
  return select(outside, vfloat(fill), Storage::load(buffer));
}

template <class Storage>
FASTPPO_INLINE void store_tail(typename Storage::type* p, int count, const vfloat& v) {
#if defined(__AVX2__)
  if constexpr (std::is_same_v<Storage, F32>) return store_masked(p, lane_numbers() < count, v);
#endif
  typename Storage::type buffer[kLanes];
  Storage::store(buffer, v);
  std::memcpy(p, buffer, count * sizeof *p);
}

// The first `count` <= 16 floats at p; lanes beyond are 0, and memory beyond is not touched.
FASTPPO_INLINE vfloat load(const float* p, int count) { return count == kLanes ? F32::load(p) : load_tail<F32>(p, count, 0); }

FASTPPO_INLINE void store(float* p, int count, const vfloat& v) {
  if (count == kLanes) F32::store(p, v);
  else store_tail<F32>(p, count, v);
}

// Calls body(i, count) for vectors of `count` elements from i on that together are [first, last): 16 each, and fewer for the last.
template <class Body>
FASTPPO_INLINE void for_vectors(int64_t first, int64_t last, const Body& body) {
  int64_t i = first;
  for (; i + kLanes <= last; i += kLanes) body(i, kLanes);
  if (i < last) body(i, static_cast<int>(last - i));
}

typedef float Quad __attribute__((vector_size(16)));

#if defined(__AVX2__)
// combine(lower half, upper half), in registers: GCC would pass them through memory.
template <class Combine>
FASTPPO_INLINE __m256 halve(const vfloat& v, const Combine& combine) {
#if defined(__AVX512F__)
  // With a mask of all lanes: without one, GCC 12 warns of the undefined lanes that its own header keeps.
  __m256 low;
  std::memcpy(&low, &v, sizeof low);
  return combine(low, _mm512_maskz_extractf32x8_ps(0xff, v.part[0], 1));
#else
  return combine(v.part[0], v.part[1]);
#endif
}
#endif

// Lanes always fold in halves, so the order of additions is fixed: 16 to 4 here.
FASTPPO_INLINE Quad fold_to_quad(const vfloat& v) {
#if defined(__AVX2__)
  const __m256 halves = halve(v, [](__m256 a, __m256 b) { return a + b; });
  return _mm256_castps256_ps128(halves) + _mm256_extractf128_ps(halves, 1);
#else
  Quad q[4];
  std::memcpy(q, &v, sizeof v);
  return (q[0] + q[2]) + (q[1] + q[3]);
#endif
}

FASTPPO_INLINE float sum_lanes(const vfloat& v) {
  const Quad folded = fold_to_quad(v);
  return (folded[0] + folded[2]) + (folded[1] + folded[3]);
}

// sum_lanes of four vectors at once.
FASTPPO_INLINE Quad sum_lanes_of_four(const vfloat* v) {
  const Quad a = fold_to_quad(v[0]), b = fold_to_quad(v[1]), c = fold_to_quad(v[2]), d = fold_to_quad(v[3]);
#if defined(__SSE2__)
  const Quad ab = Quad(_mm_movelh_ps(a, b)) + Quad(_mm_movehl_ps(b, a)), cd = Quad(_mm_movelh_ps(c, d)) + Quad(_mm_movehl_ps(d, c));
  return Quad(_mm_shuffle_ps(ab, cd, _MM_SHUFFLE(2, 0, 2, 0))) + Quad(_mm_shuffle_ps(ab, cd, _MM_SHUFFLE(3, 1, 3, 1)));
#else
  const auto sum = [](const Quad& q) { return (q[0] + q[2]) + (q[1] + q[3]); };
  return Quad{sum(a), sum(b), sum(c), sum(d)};
#endif
}

FASTPPO_INLINE float max_lanes(const vfloat& v) {
  const auto larger = [](const auto& a, const auto& b) { return a > b ? a : b; };
#if defined(__AVX2__)
  const __m256 halves = halve(v, [](__m256 a, __m256 b) { return _mm256_max_ps(a, b); });
  const Quad folded = _mm_max_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
#else
  Quad q[4];
  std::memcpy(q, &v, sizeof v);
  const Quad folded = larger(larger(q[0], q[2]), larger(q[1], q[3]));
#endif
  return larger(larger(folded[0], folded[2]), larger(folded[1], folded[3]));
}

// max_lanes of four vectors at once.
FASTPPO_INLINE Quad max_lanes_of_four(const vfloat* v) {
#if defined(__AVX2__)
  Quad quads[4];
  for (int i = 0; i < 4; ++i) {
    const __m256 halves = halve(v[i], [](__m256 a, __m256 b) { return _mm256_max_ps(a, b); });
    quads[i] = _mm_max_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
  }
  const Quad ab = _mm_max_ps(_mm_movelh_ps(quads[0], quads[1]), _mm_movehl_ps(quads[1], quads[0]));
  const Quad cd = _mm_max_ps(_mm_movelh_ps(quads[2], quads[3]), _mm_movehl_ps(quads[3], quads[2]));
  return _mm_max_ps(_mm_shuffle_ps(ab, cd, _MM_SHUFFLE(2, 0, 2, 0)), _mm_shuffle_ps(ab, cd, _MM_SHUFFLE(3, 1, 3, 1)));
#else
  return Quad{max_lanes(v[0]), max_lanes(v[1]), max_lanes(v[2]), max_lanes(v[3])};
#endif
}

// As number.h's for a float.
FASTPPO_INLINE vfloat power_of_two(const vfloat& shifted) {
  return bit_cast<float>((bit_cast<int32_t>(shifted) << 23) + bit_cast<int32_t>(vfloat(1.0f)));
}

// exp(r) for |r| <= ln 2 / 2.
FASTPPO_INLINE vfloat exp_polynomial(const vfloat& r) { return (exp_remainder(r) * (r * r) + r) + 1.0f; }

// exp(x) within 1.2 ulp: x = n ln 2 + r, exp(x) = 2^n exp(r), with 2^n in two factors so that results reach the denormals.
// exp(-inf) = 0, exp(inf) = inf, exp(NaN) = NaN.
FASTPPO_INLINE vfloat vexp(const vfloat& x) {
  const vfloat clamped = vmin(vfloat(89.0f), vmax(vfloat(-104.0f), x));
  const vfloat shifted = clamped * kLog2E + kShifter;
  const vfloat n = shifted - kShifter;
  const vfloat r = (clamped - n * kLn2High) - n * kLn2Low;
  const vint exponent = bit_cast<int32_t>(shifted) - bit_cast<int32_t>(vfloat(kShifter));
  const vint half = exponent >> 1;
  const vfloat scale_low = bit_cast<float>((half + 127) << 23);
  const vfloat scale_high = bit_cast<float>((exponent - half + 127) << 23);
  const vfloat result = exp_polynomial(r) * scale_low * scale_high;
  return select(x != x, x, select(x < -104.0f, vfloat(0.0f), result));
}

// exp(x) for x <= 0, as softmax needs it: results below 2^-126 become 0. NaN stays NaN. vexp's digits for about half its work.
FASTPPO_INLINE vfloat vexp_nonpositive(const vfloat& x) {
  const vfloat shifted = x * kLog2E + kShifter;
  const vfloat n = shifted - kShifter;
  const vfloat r = (x - n * kLn2High) - n * kLn2Low;
  const vint exponent = bit_cast<int32_t>(shifted) << 23;  // the shifter's own bits leave at the top
  const vfloat result = bit_cast<float>(bit_cast<int32_t>(exp_polynomial(r)) + exponent);
  return select(x < kExpUnderflow, vfloat(0.0f), result);
}

// tanh(x) within 3 ulp: a Taylor series to x^9 near 0, where 1 - 2 / (exp(2|x|) + 1) would cancel.
FASTPPO_INLINE vfloat vtanh(const vfloat& x) {
  const vfloat a = select(x < 0.0f, -x, x);
  const vfloat large = 1.0f - 2.0f / (vexp(a + a) + 1.0f);
  const vfloat s = x * x;
  const vfloat series = -0.333333333f + s * (0.133333333f + s * (-0.0539682540f + s * 0.0218694885f));
  const vfloat magnitude = select(a < 0.1875f, a + a * s * series, large);
  return select(x != x, x, select(x < 0.0f, -magnitude, magnitude));
}

}  // namespace fastppo::FASTPPO_ISA
