// Finds, over weighted items that the threads of a block share among themselves, the smallest key at which the running weight reaches a sum: a
// threshold of top-k (weights 1) or top-p (masses), or a token (keys are places in the row). All weights are integers, so no order of additions and no
// order of the items can change what is found.
#pragma once

#include "device.h"

namespace fastppo::cuda {

constexpr int kSearchThreads = 512;  // at most
constexpr int kBinBits = 11, kBins = 1 << kBinBits;

struct Smaller {
  __device__ uint32_t operator()(uint32_t a, uint32_t b) const { return a < b ? a : b; }
};

// The sum over the threads in front of this one.
__device__ __forceinline__ uint64_t sum_in_front(uint64_t own) {
  __shared__ uint64_t partial[kSearchThreads / kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  uint64_t sum = own;
#pragma unroll
  for (int delta = 1; delta < kWarpSize; delta *= 2) {
    const uint64_t other = __shfl_up_sync(kFullWarp, sum, delta);
    if (lane >= delta) sum += other;
  }
  if (lane == kWarpSize - 1) partial[warp] = sum;
  __syncthreads();
  for (int i = 0; i < warp; ++i) sum += partial[i];
  return sum - own;
}

// Shared memory of a search.
struct SearchBoard {
  unsigned long long bins[kBins];
  uint32_t keys[kSearchThreads];
  uint64_t before;
  int bin;
};

struct Found {
  uint32_t key;
  uint64_t need;  // of the weight at `key`
};

// Sets board.bin to the bin in which the running sum reaches `need`, and board.before to the sum in front of it.
__device__ __forceinline__ void find_bin(SearchBoard& board, int bins, uint64_t need) {
  const int share = (bins + blockDim.x - 1) / blockDim.x, first = threadIdx.x * share, last = min(bins, first + share);
  uint64_t own = 0;
  for (int i = first; i < last; ++i) own += board.bins[i];
  uint64_t before = sum_in_front(own);
  if (before < need && need <= before + own) {
    int bin = first;
    for (; before + board.bins[bin] < need; ++bin) before += board.bins[bin];
    board.bin = bin;
    board.before = before;
  }
  __syncthreads();
}

// Among keys in [low, high]; `high` where all of them weigh less than `need`. each(visit) calls visit(key, weight) for the thread's items, as often as
// it is called: a radix select, in which every look at the items leaves 1 / kBins of the keys.
template <class Each>
__device__ __forceinline__ Found search(SearchBoard& board, uint32_t low, uint32_t high, uint64_t need, const Each& each) {
  for (;;) {
    const int shift = max(0, 32 - kBinBits - __clz(high - low)), bins = ((high - low) >> shift) + 1;
    for (int i = threadIdx.x; i < bins; i += blockDim.x) board.bins[i] = 0;
    if (threadIdx.x == 0) board.bin = -1;
    __syncthreads();
    each([&](uint32_t key, uint64_t weight) {
      if (key - low <= high - low && weight) atomicAdd(&board.bins[(key - low) >> shift], static_cast<unsigned long long>(weight));
    });
    __syncthreads();
    find_bin(board, bins, need);
    const int bin = board.bin;
    need -= bin < 0 ? 0 : board.before;
    __syncthreads();  // the board is wiped next
    if (bin < 0) return {high, need};
    low += static_cast<uint32_t>(bin) << shift;
    high = min(high, low + ((1u << shift) - 1));
    if (shift == 0) return {low, need};
  }
}

// The same for `count` <= blockDim.x items, thread i's own being item i: each adds up what lies at or below its key.
__device__ __forceinline__ uint32_t search_few(SearchBoard& board, int count, uint32_t high, uint64_t need, uint32_t key, uint64_t weight) {
  if (threadIdx.x < count) {
    board.keys[threadIdx.x] = key;
    board.bins[threadIdx.x] = weight;
  }
  __syncthreads();
  uint64_t sum = 0;
  if (threadIdx.x < count)
    for (int i = 0; i < count; ++i) sum += board.keys[i] <= key ? board.bins[i] : 0;
  return block_reduce<kSearchThreads>(threadIdx.x < count && sum >= need ? min(key, high) : high, Smaller{});
}

}  // namespace fastppo::cuda
