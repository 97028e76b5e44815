// Mean and variance of the masked elements in one read, and the whitened tensor in one more. Every thread sums its elements in fp64 around one of
// them; threads, then blocks, are merged in a fixed order.
#include "../common/moments.h"
#include "device.h"
#include "launch.h"
#include "launchers.h"

namespace fastppo::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 8;  // loads in flight
constexpr int64_t kTile = kThreads * kPerThread;

struct Merge {
  __device__ __forceinline__ Moments operator()(const Moments& a, const Moments& b) const { return merge(a, b); }
};

// Around the first element.
struct PivotedSums {
  double pivot = 0, sum = 0, squares = 0;
  int64_t count = 0;

  __device__ __forceinline__ void add(float x) {
    if (count++ == 0) pivot = pivot_of(x);
    const double d = x - pivot;
    sum += d;
    squares += d * d;
  }
  __device__ __forceinline__ Moments moments() const { return moments_around(pivot, static_cast<double>(count), sum, squares); }
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
  const double m = *mean, scale = whitening_scale({*moment_count, m, *squares}), shift = keep_mean ? m : 0;
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
