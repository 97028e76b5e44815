// What kernels share: storage types, exchanges within a warp and a block.
//
// A `static` local in this namespace is a kernel's shared memory and nothing else: tests/cuda_on_cpu fills all of them with NaN before each block.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../ops.h"

namespace fastppo::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// ---- storage types

__device__ __forceinline__ float half_to_float(uint16_t bits) {
#ifdef __CUDACC__
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
#else
  return emulator::half_to_float(bits);
#endif
}

__device__ __forceinline__ uint16_t float_to_half(float x) {
#ifdef __CUDACC__
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#else
  return emulator::float_to_half(x);
#endif
}

__device__ __forceinline__ float bfloat16_to_float(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

__device__ __forceinline__ uint16_t float_to_bfloat16(float x) {
#ifdef __CUDACC__
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#else
  return emulator::float_to_bfloat16(x);
#endif
}

// How numbers lie in memory. `type` is what a pointer points to; arithmetic is fp32.
struct Float32 {
  typedef float type;
  __device__ static __forceinline__ float to_float(float x) { return x; }
};
struct BFloat16 {
  typedef uint16_t type;
  __device__ static __forceinline__ float to_float(uint16_t bits) { return bfloat16_to_float(bits); }
};
struct Float16 {
  typedef uint16_t type;
  __device__ static __forceinline__ float to_float(uint16_t bits) { return half_to_float(bits); }
};

// Calls f(Float32{}), f(BFloat16{}) or f(Float16{}), on the host, and returns what it returns.
template <class F>
auto with_storage(DType dtype, const F& f) {
  return dtype == kFloat32 ? f(Float32{}) : dtype == kBFloat16 ? f(BFloat16{}) : f(Float16{});
}

// Element `i` where the type is known only at run time: the branch is the same for all threads.
__device__ __forceinline__ float load_number(const void* data, DType dtype, int64_t i) {
  if (dtype == kFloat32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return dtype == kBFloat16 ? bfloat16_to_float(bits) : half_to_float(bits);
}

// ---- exchanges. An operation takes two values and returns one; the order of its arguments is that of the lanes, and always the same.

struct Add {
  template <class T>
  __device__ __forceinline__ T operator()(const T& a, const T& b) const {
    return a + b;
  }
};

// NaN wins over every number.
struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return a > b || a != a ? a : b; }
};

// The value `delta` lanes further up; T is made of 4-byte words.
template <class T>
__device__ __forceinline__ T shuffle_down(const T& value, int delta) {
  static_assert(sizeof(T) % 4 == 0 && std::is_trivially_copyable<T>::value, "words that registers can hold");
  uint32_t words[sizeof(T) / 4];
  std::memcpy(words, &value, sizeof value);
#pragma unroll
  for (uint32_t& word : words) word = __shfl_down_sync(kFullWarp, word, delta);
  T result;
  std::memcpy(&result, words, sizeof result);
  return result;
}

// All values of the warp, in lane 0.
template <class T, class Op>
__device__ __forceinline__ T warp_reduce(T value, const Op& op) {
#pragma unroll
  for (int delta = kWarpSize / 2; delta > 0; delta /= 2) value = op(value, shuffle_down(value, delta));
  return value;
}

// All values of a block of up to kMost threads, in every thread. Ends with a barrier: may be called again at once.
template <int kMost, class T, class Op>
__device__ T block_reduce(T value, const Op& op) {
  static_assert(kMost % kWarpSize == 0, "whole warps");
  __shared__ T partial[kMost / kWarpSize];
  value = warp_reduce(value, op);
  if (threadIdx.x % kWarpSize == 0) partial[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  T result = partial[0];
  for (unsigned warp = 1; warp < blockDim.x / kWarpSize; ++warp) result = op(result, partial[warp]);
  __syncthreads();  // until all have read
  return result;
}

// The launch's shared memory as an array of T.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ __align__(128) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
#else
  return reinterpret_cast<T*>(emulator::dynamic_shared());
#endif
}

// Starts a copy of 4 bytes from global to shared memory, which is there after this thread's wait_for_copies().
__device__ __forceinline__ void copy_async(float* shared, const float* global) {
#ifdef __CUDACC__
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "l"(global) : "memory");
#else
  emulator::copy_async(shared, global, sizeof *shared);
#endif
}

__device__ __forceinline__ void wait_for_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_all;" ::: "memory");
#else
  emulator::wait_for_copies();
#endif
}

}  // namespace fastppo::cuda
