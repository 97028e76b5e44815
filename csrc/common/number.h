// What formulas need to be written once for a vector of tokens on the CPU and for one token in a GPU's thread.
//
// They are templates over Number: `float` here, or the sixteen lanes of csrc/cpu/simd.h, whose functions of these names are found beside the type.
#pragma once

#include <cmath>

#include "../sampling_math.h"

// FASTPPO_CALLS_ANY stands before templates that call what they are given, which may be for the device alone.
#ifdef __CUDACC__
#define FASTPPO_SHARED __host__ __device__ __forceinline__
#define FASTPPO_CALLS_ANY _Pragma("nv_exec_check_disable")
#else
#define FASTPPO_SHARED inline __attribute__((always_inline))
#define FASTPPO_CALLS_ANY
#endif

namespace fastppo {

FASTPPO_SHARED float select(bool condition, float yes, float no) { return condition ? yes : no; }

// The larger (smaller) of two; where one is NaN, b.
FASTPPO_SHARED float vmax(float a, float b) { return a > b ? a : b; }
FASTPPO_SHARED float vmin(float a, float b) { return a < b ? a : b; }

FASTPPO_SHARED float vexp(float x) { return expf(x); }

// 2^n, n in [-126, 127], from n + kShifter, whose last bits are n's.
FASTPPO_SHARED float power_of_two(float shifted) { return same_bits<float>((same_bits<uint32_t>(shifted) << 23) + same_bits<uint32_t>(1.0f)); }

// (exp(r) - 1 - r) / r^2 for |r| <= ln 2 / 2.
template <class Number>
FASTPPO_SHARED Number exp_remainder(const Number& r) {
  Number poly = Number(kExp5) * r + kExp4;
  poly = poly * r + kExp3;
  poly = poly * r + kExp2;
  poly = poly * r + kExp1;
  return poly * r + kExp0;
}

// What a comparison of numbers gives: bool, or a lane mask.
template <class Number>
using Condition = decltype(Number() < Number());

// A parameter that takes part in no deduction: a plain float converts to a vector. By value: device code may not refer to a constant of the host.
template <class Number>
struct Plain {
  typedef Number type;
};
template <class Number>
using Like = typename Plain<Number>::type;

// Beyond the bounds, where torch.clamp's gradient stops; at them it flows.
template <class Number>
FASTPPO_SHARED Condition<Number> outside(const Number& x, Like<Number> low, Like<Number> high) {
  return (x < low) | (x > high);
}

// torch.clamp: a NaN stays.
template <class Number>
FASTPPO_SHARED Number clamp(const Number& x, Like<Number> low, Like<Number> high) {
  return select(x < low, low, select(x > high, high, x));
}

}  // namespace fastppo
