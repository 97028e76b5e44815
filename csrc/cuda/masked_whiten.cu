// Mean and variance of the masked elements in one read, and the whitened tensor in one more. Every thread sums its elements in fp64 around one of
// them; threads, then blocks, are merged in a fixed order.
#include "device.h"
#include "launch.h"
#include "launchers.h"

namespace fastppo::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 8;  // loads in flight
constexpr int64_t kTile = kThreads * kPerThread;
constexpr double kVarianceFloor = 1e-8;

// Of both sets together. Chan, Golub and LeVeque 1979: no difference of large sums, so a large mean costs no digits. Infinite means have no difference
// to go by: their own sum has the infinity, or the NaN, of all elements' sum.
struct Merge {
  __device__ __forceinline__ Moments operator()(const Moments& a, const Moments& b) const {
    if (b.count == 0) return a;
    if (a.count == 0) return b;
    const double count = a.count + b.count, delta = b.mean - a.mean, share = b.count / count;
    const double mean = isfinite(delta) ? a.mean + delta * share : a.mean + b.mean;
    return {count, mean, a.squares + b.squares + delta * delta * (a.count * share)};
  }
};

// Sums of d = x - pivot and of d^2, where the pivot is the first element: its own square bounds what the difference of the sums can lose, and equal
// elements give exactly 0. An infinite one is no pivot: 0 is.
struct PivotedSums {
  double pivot = 0, sum = 0, squares = 0;
  int64_t count = 0;

  __device__ __forceinline__ void add(float x) {
    if (count++ == 0) pivot = isinf(x) ? 0.0 : x;
    const double d = x - pivot;
    sum += d;
    squares += d * d;
  }
  __device__ __forceinline__ Moments moments() const {
    if (count == 0) return {0, 0, 0};
    const double n = static_cast<double>(count), mean = sum / n;
    return {n, pivot + mean, squares - sum * mean};
  }
};

// Calls body(i, x[i]) at the kept elements of this thread among those of a tile, all loads first.
template <class Storage>
struct Tile {
  float x[kPerThread];
  bool keep[kPerThread];

  __device__ __forceinline__ Tile(const typename Storage::type* data, const uint8_t* mask, int64_t begin, int64_t count) {
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const int64_t i = begin + threadIdx.x + k * kThreads;
      keep[k] = i < count && (!mask || mask[i]);
      x[k] = i < count ? Storage::to_float(data[i]) : 0.0f;
    }
  }
};

template <class Storage>
__global__ void __launch_bounds__(kThreads) partial_moments_kernel(const typename Storage::type* __restrict__ x, const uint8_t* __restrict__ mask,
                                                                   int64_t count, Moments* __restrict__ partial) {
  PivotedSums sums;
  for (int64_t begin = blockIdx.x * kTile; begin < count; begin += gridDim.x * kTile) {
    const Tile<Storage> tile(x, mask, begin, count);
#pragma unroll
    for (int k = 0; k < kPerThread; ++k)
      if (tile.keep[k]) sums.add(tile.x[k]);
  }
  const Moments moments = block_reduce<kThreads>(sums.moments(), Merge{});
  if (threadIdx.x == 0) partial[blockIdx.x] = moments;
}

__global__ void __launch_bounds__(kThreads) merge_moments_kernel(const Moments* __restrict__ partial, int parts, double* __restrict__ count,
                                                                 double* __restrict__ mean, double* __restrict__ squares) {
  Moments moments = {0, 0, 0};
  for (int i = threadIdx.x; i < parts; i += kThreads) moments = Merge{}(moments, partial[i]);
  moments = block_reduce<kThreads>(moments, Merge{});
  if (threadIdx.x == 0) *count = moments.count, *mean = moments.mean, *squares = moments.squares;
}

template <class Storage>
__global__ void __launch_bounds__(kThreads)
    masked_whiten_kernel(const typename Storage::type* __restrict__ x, const uint8_t* __restrict__ mask, int64_t count,
                         const double* __restrict__ moment_count, const double* __restrict__ mean, const double* __restrict__ squares, bool keep_mean,
                         float* __restrict__ out) {
  const double n = *moment_count, m = *mean, variance = n > 1 ? *squares / (n - 1) : 0;
  const double scale = 1 / sqrt(variance + kVarianceFloor), shift = keep_mean ? m : 0;
  const int64_t begin = blockIdx.x * kTile;
  const Tile<Storage> tile(x, mask, begin, count);
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int64_t i = begin + threadIdx.x + k * kThreads;
    if (i < count) out[i] = tile.keep[k] ? static_cast<float>((tile.x[k] - m) * scale + shift) : 0.0f;
  }
}

}  // namespace

cudaError_t masked_moments(const Column& x, const uint8_t* mask, int64_t count, Moments* partial, double* moment_count, double* mean, double* squares,
                           cudaStream_t stream) {
  const int64_t tiles = (count + kTile - 1) / kTile;
  const int parts = static_cast<int>(tiles < kMaxPartialMoments ? tiles : kMaxPartialMoments);
  const cudaError_t error = with_storage(x.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    return launch(partial_moments_kernel<Storage>, parts, kThreads, 0, stream, static_cast<const typename Storage::type*>(x.data), mask, count, partial);
  });
  return error != cudaSuccess ? error : launch(merge_moments_kernel, 1, kThreads, 0, stream, partial, parts, moment_count, mean, squares);
}

cudaError_t masked_whiten(const Column& x, const uint8_t* mask, int64_t count, const double* moment_count, const double* mean, const double* squares,
                          bool keep_mean, float* out, cudaStream_t stream) {
  return with_storage(x.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    return launch(masked_whiten_kernel<Storage>, blocks_for(count, kTile), kThreads, 0, stream, static_cast<const typename Storage::type*>(x.data), mask,
                  count, moment_count, mean, squares, keep_mean, out);
  });
}

}  // namespace fastppo::cuda
