// One token for each row of logits, to the bit the one that csrc/cpu/sample_tokens.cpp chooses: every sum that decides is over integers.
//
// A row is cut into chunks of kChunk logits, one block each, whatever the batch: a row's bits do not depend on the rows beside it, one long row still
// fills the GPU, and nothing here needs more than an sm_80. Three kernels: `scan` reads all logits and leaves maxima and sums of exponentials; `weigh`
// adds up masses against the row's maximum; `choose`, one block a row, finds thresholds and token among the few groups whose maximum says that they
// matter.
#include <cfloat>

#include "../sampling_math.h"
#include "device.h"
#include "launch.h"
#include "launchers.h"

namespace fastppo::cuda {
namespace {

constexpr int kPerThread = 32;
constexpr int kChunkThreads = 256;
constexpr int kChunk = kChunkThreads * kPerThread;
constexpr int kGroup = 64;  // neighbours whose maximum `scan` keeps
constexpr int kChooseThreads = 512;
constexpr int kBinBits = 11, kBins = 1 << kBinBits;
constexpr int kListed = 2048;  // tokens that `choose` holds in shared memory; where more are left it reads the row again
constexpr float kMultipliedBelow = 64.0f;
constexpr float kInfinity = __builtin_inff();

struct Layout {
  int width, groups, chunks;
};

Layout layout(int64_t width) {
  return {static_cast<int>(width), static_cast<int>((width + kGroup - 1) / kGroup), static_cast<int>((width + kChunk - 1) / kChunk)};
}

// What the kernels hand on, for each row: x are logits as they are stored, not yet divided by the temperature.
struct Scratch {
  double* chunk_sum;      // [rows, chunks] sum exp((x - chunk's max x) / temperature)
  uint64_t* chunk_mass;   // [rows, chunks]
  float* chunk_max;       // [rows, chunks] largest x
  float* group_max;       // [rows, groups] largest x
};

Scratch scratch_in(void* scratch, int64_t rows, const Layout& shape) {
  auto* sums = static_cast<double*>(scratch);
  auto* masses = reinterpret_cast<uint64_t*>(sums + rows * shape.chunks);
  auto* maxima = reinterpret_cast<float*>(masses + rows * shape.chunks);
  return {sums, masses, maxima, maxima + rows * shape.chunks};
}

template <class Storage>
__device__ const typename Storage::type* row_of(const Rows& logits, int64_t row) {
  const int64_t offset = row / logits.inner * logits.stride_outer + row % logits.inner * logits.stride_inner;
  return static_cast<const typename Storage::type*>(logits.data) + offset;
}

__device__ RowParameters row_parameters(const SamplingParameters& p, int64_t row) {
  return {p.temperature[row], p.top_k[row], p.top_p[row], p.min_p[row], philox(p.seed, p.sequence_ids[row], p.positions[row])};
}

// As on the CPU: divided, not multiplied by a rounded reciprocal.
__device__ float scaled(float x, float temperature) { return temperature == 1.0f ? x : __fdiv_rn(x, temperature); }

// The larger; where one is NaN, the other.
struct Larger {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// block_reduce for a block of up to kMost threads.
template <int kMost, class T, class Op>
__device__ T reduce(T value, const Op& op) {
  __shared__ T partial[kMost / kWarpSize];
  value = warp_reduce(value, op);
  if (threadIdx.x % kWarpSize == 0) partial[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  T result = partial[0];
  for (int warp = 1; warp < blockDim.x / kWarpSize; ++warp) result = op(result, partial[warp]);
  __syncthreads();  // until all have read
  return result;
}

// The sum over the threads in front of this one.
__device__ uint64_t sum_in_front(uint64_t own) {
  __shared__ uint64_t partial[kChooseThreads / kWarpSize];
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

// The logits of a chunk, kPerThread a thread: x[i * kVector + j] is number begin(i) + j of the row; -inf beyond the row.
template <class Storage>
struct ChunkLogits {
  static constexpr int kVector = 16 / sizeof(typename Storage::type), kVectors = kPerThread / kVector;
  const int chunk_begin;
  float x[kPerThread];

  __device__ explicit ChunkLogits(int chunk) : chunk_begin(chunk * kChunk) {}
  __device__ int begin(int i) const { return chunk_begin + (i * blockDim.x + threadIdx.x) * kVector; }

  // kAligned: the row starts at a multiple of 16 bytes.
  template <bool kAligned>
  __device__ void load(const typename Storage::type* row, int width) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      typename Storage::type stored[kVector];
      const int first = begin(i);
      if (kAligned && first + kVector <= width) {
        const uint4 bits = *reinterpret_cast<const uint4*>(row + first);
        memcpy(stored, &bits, sizeof bits);
#pragma unroll
        for (int j = 0; j < kVector; ++j) x[i * kVector + j] = Storage::to_float(stored[j]);
      } else {
#pragma unroll
        for (int j = 0; j < kVector; ++j) x[i * kVector + j] = first + j < width ? Storage::to_float(row[first + j]) : -kInfinity;
      }
    }
  }
};

__device__ float exp2_of(float x) {
#ifdef __CUDACC__
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x));
  return e;
#else
  return exp2f(x);
#endif
}

// The thread's sum of exp((x - top) / temperature). Log-probs need no exact bits, so near 0 one multiplication takes the place of the division; far
// from it the rounding of z = x / temperature shows in the probabilities and is part of their definition.
__device__ float sum_of_exps(const float* x, float top, float temperature) {
  const float z_top = scaled(top, temperature), z_shift = z_top == -kInfinity ? 0.0f : z_top;  // exp(-inf) adds 0, and a NaN still shows
  float sum = 0;
  if (fabsf(z_top) < kMultipliedBelow) {
    const float scale = fminf(kLog2E / temperature, FLT_MAX);  // not inf: x == top gives 0
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) sum += exp2_of((x[i] - top) * scale);
  } else {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) sum += exp2_of((scaled(x[i], temperature) - z_shift) * kLog2E);
  }
  return sum;
}

template <class Storage, bool kAligned>
__global__ void __launch_bounds__(kChunkThreads) scan_kernel(Rows logits, const float* temperature, Layout shape, Scratch w) {
  const int64_t row = blockIdx.x / shape.chunks;
  ChunkLogits<Storage> logit(blockIdx.x % shape.chunks);
  logit.template load<kAligned>(row_of<Storage>(logits, row), shape.width);

  constexpr int kVector = ChunkLogits<Storage>::kVector, kGroupLanes = kGroup / kVector;
  float top = -kInfinity;
#pragma unroll
  for (int i = 0; i < ChunkLogits<Storage>::kVectors; ++i) {
    float group = logit.x[i * kVector];
#pragma unroll
    for (int j = 1; j < kVector; ++j) group = fmaxf(group, logit.x[i * kVector + j]);
#pragma unroll
    for (int step = 1; step < kGroupLanes; step *= 2) group = fmaxf(group, __shfl_xor_sync(kFullWarp, group, step));
    if (threadIdx.x % kGroupLanes == 0 && logit.begin(i) < shape.width) w.group_max[row * shape.groups + logit.begin(i) / kGroup] = group;
    top = fmaxf(top, group);
  }
  top = reduce<kChunkThreads>(top, Larger{});

  const float sum = sum_of_exps(logit.x, top, temperature[row] == 0 ? 1.0f : temperature[row]);
  const double chunk_sum = reduce<kChunkThreads>(static_cast<double>(sum), Add{});
  if (threadIdx.x == 0) {
    w.chunk_max[blockIdx.x] = top;
    w.chunk_sum[blockIdx.x] = chunk_sum;
  }
}

// Sum of mass_of over up to kPerThread values e, without 64-bit arithmetic for each: e = a + b, a a multiple of 2^-17 and b one of 2^-40, each counted
// by the bits of a float to which it was added.
class MassSum {
  static constexpr float kHighShifter = 0x1.8p6f, kLowShifter = 0x1.8p-17f;  // last places 2^-17 and 2^-40
  uint32_t high_ = 0, low_ = 0;

 public:
  __device__ void add(float e) {
    const float shifted = rounded_sum(e, kHighShifter);
    const float rest = rounded_sum(e, -rounded_sum(shifted, -kHighShifter));
    high_ += same_bits<uint32_t>(shifted) - same_bits<uint32_t>(kHighShifter);
    low_ += same_bits<uint32_t>(rounded_sum(rest, kLowShifter)) - same_bits<uint32_t>(kLowShifter);
  }
  __device__ uint64_t total() const { return (static_cast<uint64_t>(high_) << 23) + static_cast<int64_t>(static_cast<int32_t>(low_)); }
};

template <class Storage, bool kAligned>
__global__ void __launch_bounds__(kChunkThreads) weigh_kernel(Rows logits, SamplingParameters parameters, Layout shape, Scratch w) {
  const int64_t row = blockIdx.x / shape.chunks;
  const float temperature = parameters.temperature[row];
  if (!(temperature > 0)) return;  // greedy, or an error
  float top = -kInfinity;
  for (int i = threadIdx.x; i < shape.chunks; i += blockDim.x) top = fmaxf(top, w.chunk_max[row * shape.chunks + i]);
  top = scaled(reduce<kChunkThreads>(top, Larger{}), temperature);

  ChunkLogits<Storage> logit(blockIdx.x % shape.chunks);
  logit.template load<kAligned>(row_of<Storage>(logits, row), shape.width);
  MassSum sum;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) sum.add(exp_nonpositive(rounded_sum(scaled(logit.x[i], temperature), -top)));
  const uint64_t mass = reduce<kChunkThreads>(sum.total(), Add{});
  if (threadIdx.x == 0) w.chunk_mass[blockIdx.x] = mass;
}

// What the threads of a `choose` block share.
struct Board {
  unsigned long long bins[kBins];
  uint2 items[kListed];  // (rank, index) of the tokens left, in any order: no sum depends on it
  uint64_t before;
  int bin, count, token;
};

// A row of logits and who is still in: tokens with depth(z) < limit_ and rank(z) <= last_rank_ and exp(z - max z) >= min_p. Ranks are integers that
// count down from the largest z; depths are even steps of z, whose histogram comes close to a threshold in one look.
template <class Storage>
class RowChooser {
  const typename Storage::type* const row_;
  const float* const group_max_;
  const Layout shape_;
  const RowParameters& p_;
  Board& board_;
  const float divisor_, max_;
  const uint32_t top_key_;
  float depth_scale_ = 0, limit_ = kInfinity;
  uint32_t last_rank_ = ~0u;
  bool listed_ = false;

 public:
  __device__ RowChooser(const typename Storage::type* row, const float* group_max, const Layout& shape, const RowParameters& p, float max, Board& board)
      : row_(row), group_max_(group_max), shape_(shape), p_(p), board_(board), divisor_(divisor(p)), max_(max), top_key_(order_key(max)) {}

  __device__ float z_of(float x) const { return scaled(x, divisor_); }
  __device__ float z_at(int index) const { return z_of(Storage::to_float(row_[index])); }

  __device__ int first_largest() {
    if (threadIdx.x == 0) board_.token = shape_.width;
    __syncthreads();
    depth_scale_ = 1, limit_ = FLT_MIN;
    each_logit(0, shape_.groups, [&](float z, int index) {
      if (z == max_) atomicMin(&board_.token, index);
    });
    __syncthreads();
    return board_.token;
  }

  // The token of an unfiltered row: first its chunk, then its place.
  __device__ int draw_unfiltered(const uint64_t* chunk_mass, uint64_t total) {
    const Found chunk = search(0, shape_.chunks - 1, multiply_high(p_.uniform, total) + 1, [&](const auto& visit) {
      for (int i = threadIdx.x; i < shape_.chunks; i += blockDim.x) visit(i, chunk_mass[i]);
    });
    const int first_group = chunk.key * (kChunk / kGroup), last_group = min(shape_.groups, first_group + kChunk / kGroup);
    return search(first_group * kGroup, min(shape_.width, last_group * kGroup) - 1, chunk.need, [&](const auto& visit) {
      each_logit(first_group, last_group, [&](float z, int index) { visit(index, mass_of(exp_nonpositive(z - max_))); });
    }).key;
  }

  // Top-k, then top-p, then min-p: narrows to the kept tokens and returns their mass.
  __device__ uint64_t filter(uint64_t total) {
    const bool top_k = has_top_k(p_, shape_.width);
    depth_scale_ = kBins / (max_ - least_kept(p_, max_, total, shape_.width)), limit_ = kBins;
    if (top_k) limit_ = 1.0f + deepest_group(p_.top_k);
    else if (p_.top_p < 1) limit_ = 1.0f + deepest_token(top_p_mass(p_.top_p, total));
    list_tokens();
    if (top_k) narrow(p_.top_k, [](uint32_t) { return uint64_t{1}; });
    if (p_.top_p < 1) narrow(top_p_mass(p_.top_p, top_k ? mass_left(0.0f) : total), [&](uint32_t rank) { return mass_at(rank, 0.0f); });
    return mass_left(p_.min_p);
  }

  // The first of the kept tokens whose cumulative mass exceeds the uniform's share of `kept`.
  __device__ int draw(uint64_t kept) {
    return search(0, shape_.width - 1, multiply_high(p_.uniform, kept) + 1, [&](const auto& visit) {
      each_token([&](uint32_t rank, int index) { visit(index, mass_at(rank, p_.min_p)); });
    }).key;
  }

 private:
  struct Found {
    uint32_t key;
    uint64_t need;  // of the weight at `key`
  };

  // The smallest key that, with all below it, weighs `need`; `high` where all of them weigh less. each(visit) shares the items among the threads and
  // calls visit(key, weight). A radix select: every look at the items leaves 1 / kBins of the keys.
  template <class Each>
  __device__ Found search(uint32_t low, uint32_t high, uint64_t need, const Each& each) {
    for (;;) {
      const int shift = max(0, 32 - kBinBits - __clz(high - low)), bins = ((high - low) >> shift) + 1;
      for (int i = threadIdx.x; i < bins; i += blockDim.x) board_.bins[i] = 0;
      if (threadIdx.x == 0) board_.bin = -1;
      __syncthreads();
      each([&](uint32_t key, uint64_t weight) {
        if (key - low <= high - low && weight) atomicAdd(&board_.bins[(key - low) >> shift], static_cast<unsigned long long>(weight));
      });
      __syncthreads();
      find_bin(bins, need);
      if (board_.bin < 0) return {high, need};
      need -= board_.before;
      low += static_cast<uint32_t>(board_.bin) << shift;
      high = min(high, low + ((1u << shift) - 1));
      __syncthreads();  // the board is wiped next
      if (shift == 0) return {low, need};
    }
  }

  // Sets board.bin to the bin in which the running sum reaches `need`, and board.before to the sum in front of it.
  __device__ void find_bin(int bins, uint64_t need) {
    const int share = (bins + blockDim.x - 1) / blockDim.x, first = threadIdx.x * share, last = min(bins, first + share);
    uint64_t own = 0;
    for (int i = first; i < last; ++i) own += board_.bins[i];
    uint64_t before = sum_in_front(own);
    if (before < need && need <= before + own) {
      int bin = first;
      for (; before + board_.bins[bin] < need; ++bin) before += board_.bins[bin];
      board_.bin = bin;
      board_.before = before;
    }
    __syncthreads();
  }

  __device__ uint32_t rank(float z) const { return top_key_ - order_key(z); }
  __device__ float depth(float z) const { return (max_ - z) * depth_scale_; }

  __device__ uint64_t mass_at(uint32_t rank, float least_e) const {
    const float e = exp_nonpositive(from_order_key(top_key_ - rank) - max_);
    return rank <= last_rank_ && e >= least_e ? mass_of(e) : 0;
  }

  // Calls body(z, index) for each logit of groups [first, last) whose maximum is still in. Neighbouring groups go to different warps.
  template <class Body>
  __device__ void each_logit(int first, int last, const Body& body) const {
    const int warps = blockDim.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    for (int base = first + threadIdx.x / kWarpSize; base < last; base += 32 * warps) {
      const int mine = base + lane * warps;
      uint32_t groups = __ballot_sync(kFullWarp, mine < last && depth(z_of(group_max_[mine])) < limit_);
      for (; groups; groups &= groups - 1) {
        const int begin = (base + (__ffs(groups) - 1) * warps) * kGroup;
#pragma unroll
        for (int i = 0; i < kGroup; i += 32)
          if (begin + i + lane < shape_.width) body(z_at(begin + i + lane), begin + i + lane);
      }
    }
  }

  // Calls body(rank, index) for each token that depth leaves in.
  template <class Body>
  __device__ void each_token(const Body& body) const {
    if (listed_) {
      for (int i = threadIdx.x; i < board_.count; i += blockDim.x) body(board_.items[i].x, board_.items[i].y);
    } else {
      each_logit(0, shape_.groups, [&](float z, int index) {
        if (depth(z) < limit_) body(rank(z), index);
      });
    }
  }

  // k groups whose maximum is >= t hold k logits >= t: the k-th largest logit is not deeper than this.
  __device__ uint32_t deepest_group(uint64_t k) {
    return search(0, kBins - 1, k, [&](const auto& visit) {
      for (int i = threadIdx.x; i < shape_.groups; i += blockDim.x) {
        const float d = depth(z_of(group_max_[i]));
        if (d < limit_) visit(static_cast<uint32_t>(d), 1);
      }
    }).key;
  }

  __device__ uint32_t deepest_token(uint64_t need) {
    return search(0, kBins - 1, need, [&](const auto& visit) {
      each_logit(0, shape_.groups, [&](float z, int) {
        const float d = depth(z);
        if (d < limit_) visit(static_cast<uint32_t>(d), mass_of(exp_nonpositive(z - max_)));
      });
    }).key;
  }

  __device__ void list_tokens() {
    if (threadIdx.x == 0) board_.count = 0;
    __syncthreads();
    each_token([&](uint32_t rank, int index) {
      const int place = atomicAdd(&board_.count, 1);
      if (place < kListed) board_.items[place] = make_uint2(rank, index);
    });
    __syncthreads();
    listed_ = board_.count <= kListed;
  }

  // Keeps the smallest set of largest logits that weighs `need`, and all that are equal to its last.
  template <class Weight>
  __device__ void narrow(uint64_t need, const Weight& weight) {
    last_rank_ = search(0, last_rank_, need, [&](const auto& visit) {
      each_token([&](uint32_t rank, int) { visit(rank, weight(rank)); });
    }).key;
  }

  __device__ uint64_t mass_left(float least_e) {
    uint64_t mass = 0;
    each_token([&](uint32_t rank, int) { mass += mass_at(rank, least_e); });
    return reduce<kChooseThreads>(mass, Add{});
  }
};

template <class Storage>
__global__ void __launch_bounds__(kChooseThreads) choose_kernel(Rows logits, SamplingParameters parameters, Layout shape, Scratch w, SampledRows out) {
  __shared__ Board board;
  const int64_t row = blockIdx.x;
  const RowParameters p = row_parameters(parameters, row);
  const float* chunk_max = w.chunk_max + row * shape.chunks;
  const uint64_t* chunk_mass = w.chunk_mass + row * shape.chunks;

  float top_x = -kInfinity;
  for (int i = threadIdx.x; i < shape.chunks; i += blockDim.x) top_x = fmaxf(top_x, chunk_max[i]);
  top_x = reduce<kChooseThreads>(top_x, Larger{});
  const float max = scaled(top_x, divisor(p));
  double sum = 0;
  for (int i = threadIdx.x; i < shape.chunks; i += blockDim.x)
    sum += w.chunk_sum[row * shape.chunks + i] * exp(static_cast<double>(scaled(chunk_max[i], divisor(p))) - max);
  sum = reduce<kChooseThreads>(sum, Add{});
  // As in torch: NaN anywhere, a +inf, or nothing but -inf leaves no distribution.
  if (!valid(p) || !(fabsf(max) < kInfinity) || sum != sum) {
    if (threadIdx.x == 0) {
      out.tokens[row] = -1;
      out.logprobs[row] = out.processed_logprobs[row] = __builtin_nanf("");
      out.kept_mass[row] = 0;
    }
    return;
  }

  RowChooser<Storage> chooser(row_of<Storage>(logits, row), w.group_max + row * shape.groups, shape, p, max, board);
  uint64_t total = 1, kept = 1;
  int token;
  if (p.temperature == 0) {
    token = chooser.first_largest();
  } else {
    uint64_t mass = 0;
    for (int i = threadIdx.x; i < shape.chunks; i += blockDim.x) mass += chunk_mass[i];
    kept = total = reduce<kChooseThreads>(mass, Add{});
    if (has_filters(p, shape.width)) {
      kept = chooser.filter(total);
      token = chooser.draw(kept);
    } else {
      token = chooser.draw_unfiltered(chunk_mass, total);
    }
  }
  if (threadIdx.x != 0) return;
  const double shifted = static_cast<double>(chooser.z_at(token)) - max;
  const float logprob = static_cast<float>(shifted - log(sum));
  out.tokens[row] = token;
  out.logprobs[row] = logprob;
  // All mass kept: the same distribution, so the same number.
  out.processed_logprobs[row] = kept == total ? logprob : static_cast<float>(shifted - log(kept / kMassScale));
  out.kept_mass[row] = static_cast<float>(static_cast<double>(kept) / static_cast<double>(total));
}

// The fewest threads, a power of two, that `elements` keep busy.
unsigned block_threads(int elements, int each, int most) {
  int threads = 32;
  while (threads < most && threads * each < elements) threads *= 2;
  return threads;
}

template <class Storage, bool kAligned>
cudaError_t run(const Rows& logits, const SamplingParameters& parameters, const SampledRows& out, void* scratch, cudaStream_t stream) {
  const Layout shape = layout(logits.width);
  const Scratch w = scratch_in(scratch, logits.count(), shape);
  const dim3 chunks(logits.count() * shape.chunks), rows(logits.count());
  const dim3 threads(block_threads(shape.width, kPerThread, kChunkThreads));
  cudaError_t error = launch(scan_kernel<Storage, kAligned>, chunks, threads, 0, stream, logits, parameters.temperature, shape, w);
  if (error != cudaSuccess) return error;
  error = launch(weigh_kernel<Storage, kAligned>, chunks, threads, 0, stream, logits, parameters, shape, w);
  if (error != cudaSuccess) return error;
  return launch(choose_kernel<Storage>, rows, dim3(block_threads(shape.width, 8, kChooseThreads)), 0, stream, logits, parameters, shape, w, out);
}

}  // namespace

size_t sample_tokens_scratch(int64_t rows, int64_t width) {
  const Layout shape = layout(width);
  return rows * (shape.chunks * (sizeof(double) + sizeof(uint64_t) + sizeof(float)) + shape.groups * sizeof(float));
}

cudaError_t sample_tokens(const Rows& logits, const SamplingParameters& parameters, const SampledRows& out, void* scratch, cudaStream_t stream) {
  if (logits.count() == 0) return cudaSuccess;
  return with_storage(logits.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    constexpr uintptr_t kBytes = 16, kSize = sizeof(typename Storage::type);
    const bool aligned = (reinterpret_cast<uintptr_t>(logits.data) | logits.stride_outer * kSize | logits.stride_inner * kSize) % kBytes == 0;
    return aligned ? run<Storage, true>(logits, parameters, out, scratch, stream) : run<Storage, false>(logits, parameters, out, scratch, stream);
  });
}

}  // namespace fastppo::cuda
