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
#include "weighted_search.h"

namespace fastppo::cuda {
namespace {

constexpr int kPerThread = 32;
constexpr int kChunkThreads = 256;
constexpr int kChunk = kChunkThreads * kPerThread;
constexpr int kGroup = 64;  // neighbours whose maximum `scan` keeps
constexpr int kWeighBlocks = 2048;  // fill a GPU; where nothing is to be weighed, more would only have to be started
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
  top = block_reduce<kChunkThreads>(top, Larger{});

  const float sum = sum_of_exps(logit.x, top, temperature[row] == 0 ? 1.0f : temperature[row]);
  const double chunk_sum = block_reduce<kChunkThreads>(static_cast<double>(sum), Add{});
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

// Whether the row's choice depends on the mass of all its tokens. Behind top-k nothing does but the share that was kept, which the sum of
// exponentials gives too: rows of several chunks, for which a second read costs something, are not weighed then.
__device__ bool is_weighed(float temperature, int64_t top_k, const Layout& shape) {
  return temperature > 0 && (shape.chunks == 1 || !(top_k > 0 && top_k < shape.width));
}

// z = x / temperature, correctly rounded, for -inf and all x of a row whose largest |x / temperature| or x is no extreme: y = 1 / temperature is
// correctly rounded and q within an ulp of the quotient after one correction, so the second correction rounds right (Markstein 1990). Below 2^-100,
// where the remainders lose bits, z is so small that exp(z - max z) cannot tell.
struct Quotient {
  float temperature, reciprocal;
  __device__ float operator()(float x) const {
    float q = rounded_product(x, reciprocal);
    q = fmaf(fmaf(-q, temperature, x), reciprocal, q);
    q = fmaf(fmaf(-q, temperature, x), reciprocal, q);
    return fmaxf(q, -FLT_MAX);  // -inf - -inf made a NaN
  }
};

template <class Storage, bool kAligned>
__global__ void __launch_bounds__(kChunkThreads) weigh_kernel(Rows logits, SamplingParameters parameters, Layout shape, int blocks_a_row,
                                                                   Scratch w) {
  const int64_t row = blockIdx.x / blocks_a_row;
  const float temperature = parameters.temperature[row];
  if (!is_weighed(temperature, parameters.top_k[row], shape)) return;
  float top = -kInfinity;
  for (int i = threadIdx.x; i < shape.chunks; i += blockDim.x) top = fmaxf(top, w.chunk_max[row * shape.chunks + i]);
  top = block_reduce<kChunkThreads>(top, Larger{});
  const bool quick = fabsf(top) < 0x1p100f && temperature > 0x1p-20f && temperature < 0x1p20f;
  const Quotient quotient{temperature, __frcp_rn(temperature)};
  top = scaled(top, temperature);

  for (int chunk = blockIdx.x % blocks_a_row; chunk < shape.chunks; chunk += blocks_a_row) {
    ChunkLogits<Storage> logit(chunk);
    logit.template load<kAligned>(row_of<Storage>(logits, row), shape.width);
    if (temperature != 1.0f) {
#pragma unroll
      for (float& x : logit.x) x = quick ? quotient(x) : scaled(x, temperature);
    }
    MassSum sum;
#pragma unroll
    for (float z : logit.x) sum.add(exp_nonpositive(rounded_sum(z, -top)));
    const uint64_t mass = block_reduce<kChunkThreads>(sum.total(), Add{});
    if (threadIdx.x == 0) w.chunk_mass[row * shape.chunks + chunk] = mass;
  }
}

// What the threads of a `choose` block share.
struct Board {
  SearchBoard search;
  uint2 items[kListed];  // (rank, index) of the tokens left
  int count, token;
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
    const Found chunk = search(board_.search, 0, shape_.chunks - 1, multiply_high(p_.uniform, total) + 1, [&](const auto& visit) {
      for (int i = threadIdx.x; i < shape_.chunks; i += blockDim.x) visit(i, chunk_mass[i]);
    });
    const int first_group = chunk.key * (kChunk / kGroup), last_group = min(shape_.groups, first_group + kChunk / kGroup);
    return search(board_.search, first_group * kGroup, min(shape_.width, last_group * kGroup) - 1, chunk.need, [&](const auto& visit) {
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
    // Each keeps the smallest set of largest logits that weighs enough, and all that are equal to its last.
    if (top_k) last_rank_ = find(last_rank_, p_.top_k, [](uint32_t rank, uint32_t) { return Item{rank, 1}; });
    if (p_.top_p < 1) {
      const uint64_t need = top_p_mass(p_.top_p, top_k ? mass_left(0.0f) : total);
      last_rank_ = find(last_rank_, need, [&](uint32_t rank, uint32_t) { return Item{rank, mass_at(rank, 0.0f)}; });
    }
    return mass_left(p_.min_p);
  }

  // The first of the kept tokens whose cumulative mass exceeds the uniform's share of `kept`.
  __device__ int draw(uint64_t kept) {
    return find(shape_.width - 1, multiply_high(p_.uniform, kept) + 1, [&](uint32_t rank, uint32_t index) {
      return Item{index, mass_at(rank, p_.min_p)};
    });
  }

 private:
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
    return search(board_.search, 0, kBins - 1, k, [&](const auto& visit) {
      for (int i = threadIdx.x; i < shape_.groups; i += blockDim.x) {
        const float d = depth(z_of(group_max_[i]));
        if (d < limit_) visit(static_cast<uint32_t>(d), 1);
      }
    }).key;
  }

  __device__ uint32_t deepest_token(uint64_t need) {
    return search(board_.search, 0, kBins - 1, need, [&](const auto& visit) {
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

  struct Item {
    uint32_t key;
    uint64_t weight;
  };

  // The key, `high` at most, at which the tokens left, item(rank, index) each, weigh `need`.
  template <class MakeItem>
  __device__ uint32_t find(uint32_t high, uint64_t need, const MakeItem& item) {
    if (listed_ && board_.count <= blockDim.x) {
      const bool has = threadIdx.x < board_.count;
      const Item own = has ? item(board_.items[threadIdx.x].x, board_.items[threadIdx.x].y) : Item{0, 0};
      return search_few(board_.search, board_.count, high, need, own.key, own.weight);
    }
    return search(board_.search, 0, high, need, [&](const auto& visit) {
      each_token([&](uint32_t rank, uint32_t index) {
        const Item one = item(rank, index);
        visit(one.key, one.weight);
      });
    }).key;
  }

  __device__ uint64_t mass_left(float least_e) {
    uint64_t mass = 0;
    each_token([&](uint32_t rank, int) { mass += mass_at(rank, least_e); });
    return block_reduce<kSearchThreads>(mass, Add{});
  }
};

__device__ uint64_t sum_of_masses(const uint64_t* chunk_mass, int chunks) {
  uint64_t mass = 0;
  for (int i = threadIdx.x; i < chunks; i += blockDim.x) mass += chunk_mass[i];
  return block_reduce<kSearchThreads>(mass, Add{});
}

template <class Storage>
__global__ void __launch_bounds__(kSearchThreads) choose_kernel(Rows logits, SamplingParameters parameters, Layout shape, Scratch w, SampledRows out) {
  __shared__ Board board;
  const int64_t row = blockIdx.x;
  const RowParameters p = row_parameters(parameters, row);
  const float* chunk_max = w.chunk_max + row * shape.chunks;
  const uint64_t* chunk_mass = w.chunk_mass + row * shape.chunks;

  float top_x = -kInfinity;
  for (int i = threadIdx.x; i < shape.chunks; i += blockDim.x) top_x = fmaxf(top_x, chunk_max[i]);
  top_x = block_reduce<kSearchThreads>(top_x, Larger{});
  const float max = scaled(top_x, divisor(p));
  double sum = 0;
  for (int i = threadIdx.x; i < shape.chunks; i += blockDim.x)
    sum += w.chunk_sum[row * shape.chunks + i] * exp(static_cast<double>(scaled(chunk_max[i], divisor(p))) - max);
  sum = block_reduce<kSearchThreads>(sum, Add{});
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
  const bool weighed = is_weighed(p.temperature, p.top_k, shape);
  uint64_t total = weighed ? sum_of_masses(chunk_mass, shape.chunks) : 0, kept = total;
  int token;
  if (p.temperature == 0) {
    token = chooser.first_largest();
  } else if (has_filters(p, shape.width)) {
    kept = chooser.filter(total);
    token = chooser.draw(kept);
  } else {
    token = chooser.draw_unfiltered(chunk_mass, total);
  }
  if (threadIdx.x != 0) return;
  const double shifted = static_cast<double>(chooser.z_at(token)) - max, mass = weighed ? static_cast<double>(total) : sum * kMassScale;
  const float logprob = static_cast<float>(shifted - log(sum)), share = p.temperature == 0 ? 1.0f : static_cast<float>(fmin(kept / mass, 1.0));
  out.tokens[row] = token;
  out.logprobs[row] = logprob;
  // All mass kept: the same distribution, so the same number.
  const bool all = weighed ? kept == total : share == 1.0f;
  out.processed_logprobs[row] = all ? logprob : static_cast<float>(shifted - log(kept / kMassScale));
  out.kept_mass[row] = share;
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
  const int64_t rows = logits.count(), enough = (kWeighBlocks + rows - 1) / rows;
  const int blocks_a_row = enough < shape.chunks ? static_cast<int>(enough) : shape.chunks;
  const dim3 threads(block_threads(shape.width, kPerThread, kChunkThreads)), choose_threads(block_threads(shape.width, 8, kSearchThreads));
  cudaError_t error = launch(scan_kernel<Storage, kAligned>, dim3(rows * shape.chunks), threads, 0, stream, logits, parameters.temperature, shape, w);
  if (error != cudaSuccess) return error;
  error = launch(weigh_kernel<Storage, kAligned>, dim3(rows * blocks_a_row), threads, 0, stream, logits, parameters, shape, blocks_a_row, w);
  if (error != cudaSuccess) return error;
  return launch(choose_kernel<Storage>, dim3(rows), choose_threads, 0, stream, logits, parameters, shape, w, out);
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
