// Stands in for CUDA's header of the same name: what the kernels of csrc/cuda use of it, for g++ and tests/cuda_on_cpu/emulator.h. Compiled with
// -ffp-contract=off, so that a * b + c rounds twice here: kernels that need one rounding say fmaf. Fast intrinsics are the C library's functions.
#pragma once

#include <math.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __constant__ static const
#define __align__(n) alignas(n)

#define EMULATOR_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// ---- vector types, aligned as CUDA's: UBSan reports a misaligned access
#define EMULATOR_VECTORS(type, name, size4)                                                              \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                               \
  struct alignas(size4) name##4 { type x, y, z, w; };                                                    \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                       \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATOR_VECTORS(float, float, 16)
EMULATOR_VECTORS(int, int, 16)
EMULATOR_VECTORS(unsigned, uint, 16)
EMULATOR_VECTORS(short, short, 8)
EMULATOR_VECTORS(unsigned short, ushort, 8)
EMULATOR_VECTORS(signed char, char, 4)
EMULATOR_VECTORS(unsigned char, uchar, 4)
EMULATOR_VECTORS(double, double, 16)
EMULATOR_VECTORS(long long, longlong, 16)
EMULATOR_VECTORS(unsigned long long, ulonglong, 16)
#undef EMULATOR_VECTORS

// ---- the runtime's functions
typedef struct CUstream_st* cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : error == cudaErrorLaunchFailure ? emulator::last_error() : "invalid argument";
}
// Few processors: kernels that loop over what the grid leaves must loop in small tests.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  return *value = attribute == cudaDevAttrMultiProcessorCount ? 3 : static_cast<int>(emulator::kMaxSharedBytes), cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  return *blocks = 2, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) { return std::memset(data, value, bytes), cudaSuccess; }

// ---- barriers
inline void __syncthreads(EMULATOR_SITE) { emulator::wait_for_block(false, {file, line}); }
inline int __syncthreads_count(int predicate, EMULATOR_SITE) { return emulator::wait_for_block(predicate, {file, line}).set; }
inline int __syncthreads_or(int predicate, EMULATOR_SITE) { return emulator::wait_for_block(predicate, {file, line}).set > 0; }
inline int __syncthreads_and(int predicate, EMULATOR_SITE) {
  const emulator::Vote vote = emulator::wait_for_block(predicate, {file, line});
  return vote.set == vote.threads;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_SITE) { emulator::wait_for_warp(mask, {file, line}); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { emulator::yield(); }
inline void __trap(EMULATOR_SITE) { emulator::trap("__trap", {file, line}); }

// ---- exchanges within a warp
namespace emulator {

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
T shuffle_from(unsigned mask, T value, int source, Site site) {
  return from_bits<T>(shuffle(mask, to_bits(value), source, site));
}

// op over the values of the lanes in the mask, in the order of the lanes.
template <class T, class Op>
T reduce(unsigned mask, T value, const Op& op, Site site) {
  uint64_t all[kWarpSize];
  collect(mask, to_bits(value), all, site);
  int i = 0;
  while (!(mask >> i & 1)) ++i;
  T result = from_bits<T>(all[i]);
  for (++i; i < kWarpSize; ++i)
    if (mask >> i & 1) result = op(result, from_bits<T>(all[i]));
  return result;
}

}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATOR_SITE) {
  return emulator::shuffle_from(mask, value, (emulator::lane() & ~(width - 1)) | (source & (width - 1)), {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_SITE) {
  const int lane = emulator::lane(), source = lane - static_cast<int>(delta);
  return emulator::shuffle_from(mask, value, source < (lane & ~(width - 1)) ? lane : source, {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_SITE) {
  const int lane = emulator::lane(), source = lane + static_cast<int>(delta);
  return emulator::shuffle_from(mask, value, source > (lane | (width - 1)) ? lane : source, {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, EMULATOR_SITE) {
  const int lane = emulator::lane(), source = lane ^ lane_mask;
  return emulator::shuffle_from(mask, value, source > (lane | (width - 1)) ? lane : source, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  const uint64_t bit = uint64_t{predicate != 0} << emulator::lane();
  return static_cast<unsigned>(emulator::reduce(mask, bit, [](uint64_t a, uint64_t b) { return a | b; }, {file, line}));
}
inline int __any_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  return emulator::reduce(mask, int{predicate != 0}, [](int a, int b) { return a | b; }, {file, line});
}
inline int __all_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  return emulator::reduce(mask, int{predicate != 0}, [](int a, int b) { return a & b; }, {file, line});
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, EMULATOR_SITE) {
  uint64_t all[emulator::kWarpSize];
  emulator::collect(mask, emulator::to_bits(value), all, {file, line});
  unsigned equal = 0;
  for (int i = 0; i < emulator::kWarpSize; ++i) equal |= unsigned{(mask >> i & 1) && all[i] == emulator::to_bits(value)} << i;
  return equal;
}
#define EMULATOR_REDUCE(name, type, expression)                                                                  \
  inline type __reduce_##name##_sync(unsigned mask, type value, EMULATOR_SITE) {                                 \
    return emulator::reduce(mask, value, [](type a, type b) -> type { return expression; }, {file, line});       \
  }
EMULATOR_REDUCE(add, unsigned, a + b)
EMULATOR_REDUCE(min, unsigned, a < b ? a : b)
EMULATOR_REDUCE(max, unsigned, a < b ? b : a)
EMULATOR_REDUCE(min, int, a < b ? a : b)
EMULATOR_REDUCE(max, int, a < b ? b : a)
EMULATOR_REDUCE(or, unsigned, a | b)
EMULATOR_REDUCE(and, unsigned, a & b)
EMULATOR_REDUCE(xor, unsigned, a ^ b)
#undef EMULATOR_REDUCE

// ---- atomics: the fibers of one OS thread never run at once
#define EMULATOR_ATOMIC(name, expression)    \
  template <class T>                         \
  T name(T* address, T value) {              \
    const T old = *address;                  \
    *address = expression;                   \
    return old;                              \
  }
EMULATOR_ATOMIC(atomicAdd, static_cast<T>(old + value))
EMULATOR_ATOMIC(atomicSub, static_cast<T>(old - value))
EMULATOR_ATOMIC(atomicMin, value < old ? value : old)
EMULATOR_ATOMIC(atomicMax, old < value ? value : old)
EMULATOR_ATOMIC(atomicOr, old | value)
EMULATOR_ATOMIC(atomicAnd, old & value)
EMULATOR_ATOMIC(atomicXor, old ^ value)
EMULATOR_ATOMIC(atomicExch, value)
#undef EMULATOR_ATOMIC
template <class T>
T atomicCAS(T* address, T expected, T value) {
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  const unsigned old = *address;
  *address = old >= limit ? 0 : old + 1;
  return old;
}

// ---- memory accesses with a cache hint
#define EMULATOR_LOAD(name) \
  template <class T>        \
  T name(const T* p) {      \
    return *p;              \
  }
EMULATOR_LOAD(__ldg)
EMULATOR_LOAD(__ldcs)
EMULATOR_LOAD(__ldcg)
EMULATOR_LOAD(__ldca)
EMULATOR_LOAD(__ldlu)
EMULATOR_LOAD(__ldcv)
#undef EMULATOR_LOAD
#define EMULATOR_STORE(name)     \
  template <class T>             \
  void name(T* p, T value) {     \
    *p = value;                  \
  }
EMULATOR_STORE(__stcs)
EMULATOR_STORE(__stcg)
EMULATOR_STORE(__stwb)
EMULATOR_STORE(__stwt)
#undef EMULATOR_STORE

// ---- arithmetic
inline float __expf(float x) { return expf(x); }
inline float __exp2f(float x) { return exp2f(x); }
inline float __exp10f(float x) { return static_cast<float>(std::pow(10.0, x)); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __tanhf(float x) { return tanhf(x); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline double rsqrt(double x) { return 1 / sqrt(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1 / sqrt(static_cast<double>(x))); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1 / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }

namespace emulator {

// CUDA's conversions saturate and take NaN to 0 (to the smallest value for 64-bit ones).
template <class Integer>
Integer convert(double x, Integer of_nan) {
  using Limits = std::numeric_limits<Integer>;
  if (x != x) return of_nan;
  if (x <= static_cast<double>(Limits::min())) return Limits::min();
  return x >= static_cast<double>(Limits::max()) ? Limits::max() : static_cast<Integer>(x);
}

}  // namespace emulator

inline int __float2int_rn(float x) { return emulator::convert<int>(nearbyint(x), 0); }
inline int __float2int_rz(float x) { return emulator::convert<int>(x, 0); }
inline int __float2int_rd(float x) { return emulator::convert<int>(floor(x), 0); }
inline int __float2int_ru(float x) { return emulator::convert<int>(ceil(x), 0); }
inline unsigned __float2uint_rn(float x) { return emulator::convert<unsigned>(nearbyint(x), 0); }
inline unsigned __float2uint_rz(float x) { return emulator::convert<unsigned>(x, 0); }
inline long long __float2ll_rn(float x) { return emulator::convert<long long>(nearbyint(x), INT64_MIN); }
inline long long __float2ll_rz(float x) { return emulator::convert<long long>(x, INT64_MIN); }
inline unsigned long long __float2ull_rn(float x) { return emulator::convert<unsigned long long>(nearbyint(x), 1ull << 63); }
inline unsigned long long __float2ull_rz(float x) { return emulator::convert<unsigned long long>(x, 1ull << 63); }
inline long long __double2ll_rn(double x) { return emulator::convert<long long>(nearbyint(x), INT64_MIN); }
inline long long __double2ll_rz(double x) { return emulator::convert<long long>(x, INT64_MIN); }
inline unsigned long long __double2ull_rn(double x) { return emulator::convert<unsigned long long>(nearbyint(x), 1ull << 63); }
inline unsigned long long __double2ull_rz(double x) { return emulator::convert<unsigned long long>(x, 1ull << 63); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }
inline float __ull2float_rn(unsigned long long x) { return static_cast<float>(x); }
inline double __ll2double_rn(long long x) { return static_cast<double>(x); }
inline double __ull2double_rn(unsigned long long x) { return static_cast<double>(x); }

#define EMULATOR_CAST(name, to, from)     \
  inline to name(from x) {                \
    to y;                                 \
    std::memcpy(&y, &x, sizeof y);        \
    return y;                             \
  }
EMULATOR_CAST(__float_as_int, int, float)
EMULATOR_CAST(__float_as_uint, unsigned, float)
EMULATOR_CAST(__int_as_float, float, int)
EMULATOR_CAST(__uint_as_float, float, unsigned)
EMULATOR_CAST(__double_as_longlong, long long, double)
EMULATOR_CAST(__longlong_as_double, double, long long)
#undef EMULATOR_CAST

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>(int64_t{a} * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

#define EMULATOR_MIN_MAX(type)                              \
  inline type min(type a, type b) { return b < a ? b : a; } \
  inline type max(type a, type b) { return a < b ? b : a; }
EMULATOR_MIN_MAX(int)
EMULATOR_MIN_MAX(unsigned)
EMULATOR_MIN_MAX(long)
EMULATOR_MIN_MAX(unsigned long)
EMULATOR_MIN_MAX(long long)
EMULATOR_MIN_MAX(unsigned long long)
#undef EMULATOR_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

// ---- 16-bit floats as bits, which csrc/cuda/device.h converts with one instruction on a GPU
namespace emulator {

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t{bits & 0x8000u} << 16, rest = bits & 0x7fffu;
  if (rest >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | rest << 13);
  // As if the exponent had fp32's bias; the product sets it right, and subnormals too.
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest << 13) * 0x1p112f));
}

inline uint16_t float_to_half(float x) {
  const uint32_t bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u;
  const float size = __uint_as_float(bits & 0x7fffffffu);
  if (x != x) return 0x7fff;
  if (size >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00u);
  // Adding a power of two whose last place is that of the result rounds to nearest, even.
  int exponent;
  frexpf(size, &exponent);
  const float unit = ldexpf(1, (exponent < -13 ? -13 : exponent) - 11);
  const float rounded = nearbyintf(size / unit) * unit;
  uint32_t result = __float_as_uint(rounded / 0x1p112f) >> 13;
  if (rounded < 0x1p-14f) result = static_cast<uint32_t>(rounded / 0x1p-24f);
  return static_cast<uint16_t>(sign | result);
}

inline float bfloat16_to_float(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }

inline uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

}  // namespace emulator
