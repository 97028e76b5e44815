// Generalised advantage estimation, parallel in time. A block walks one sequence from its end in tiles, a chunk of 128 steps a warp:
//
//   A_t = delta_t + c_t * A_{t+1} are affine maps of what comes later; a warp composes its chunk's 128 by a scan, and from chunk to chunk the value
//   itself is handed on, latest chunk first.
//
// Chunks are counted from the sequence's end, so a sequence has the same bits in every batch and packing, whatever the size of the block.
#include <cfloat>

#include "device.h"
#include "launch.h"
#include "launchers.h"

namespace fastppo::cuda {
namespace {

constexpr int kPerLane = 4;
constexpr int kChunk = kWarpSize * kPerLane;
// Of a step: it counts; nothing follows it; the recursion stops behind it; its episode was cut.
constexpr uint32_t kKeep = 1, kDone = 2, kCut = 4, kTruncated = 8;
constexpr uint32_t kBitsOfStep = 8;

// The places of a chunk, 0 the latest step: `first` is its step in the tensors, earlier ones follow downwards. `count` of them exist.
struct Places {
  int64_t row, first;
  int count;
};

// Where a sequence lies: its last step and its length. Packed tokens are one long row.
struct Span {
  int64_t row, last, length;
  __device__ __forceinline__ Places chunk(int64_t i) const {
    const int64_t left = length - i * kChunk;
    return {row, last - i * kChunk, static_cast<int>(left < 0 ? 0 : left < kChunk ? left : kChunk)};
  }
};

__device__ __forceinline__ int lane_index() { return threadIdx.x % kWarpSize; }

// A chunk as it comes from memory, places k * 32 + lane: neighbouring lanes read neighbouring addresses. Bits as they lie there: nothing waits for
// a load before the chunk is looked at.
struct Loaded {
  uint32_t rewards[kPerLane], values[kPerLane], next_values[kPerLane];
  uint32_t flags;  // a byte each
};

// x, computed each time: kept in registers over the loop, the multiples of all strides would leave none for the rest.
__device__ __forceinline__ int64_t made_here(int64_t x) {
#ifdef __CUDACC__
  asm volatile("" : "+l"(x));
#endif
  return x;
}

template <class Word>
__device__ __forceinline__ void load_words(const Steps& x, const Places& places, uint32_t (&out)[kPerLane]) {
  const Word* p = static_cast<const Word*>(x.data) + (places.row * x.stride_sequence + (places.first - lane_index()) * x.stride_step);
  const int left = places.count - lane_index();
  const int64_t back = made_here(kWarpSize * x.stride_step);
#pragma unroll
  for (int k = 0; k < kPerLane; ++k, p -= back) out[k] = k * kWarpSize < left ? *p : 0;
}

__device__ __forceinline__ void load_numbers(const Steps& x, const Places& places, uint32_t (&out)[kPerLane]) {
  if (x.dtype == kFloat32) load_words<uint32_t>(x, places, out);
  else load_words<uint16_t>(x, places, out);
}

__device__ __forceinline__ float to_float(uint32_t bits, DType dtype) {
  return dtype == kFloat32 ? __uint_as_float(bits) : dtype == kBFloat16 ? __uint_as_float(bits << 16) : half_to_float(static_cast<uint16_t>(bits));
}

// Adds `bits` to the flags of the steps whose byte is set.
__device__ __forceinline__ void load_flags(const Steps& x, const Places& places, uint32_t bits, uint32_t& flags) {
  uint32_t bytes[kPerLane];
  load_words<uint8_t>(x, places, bytes);
#pragma unroll
  for (int k = 0; k < kPerLane; ++k)
    if (bytes[k]) flags |= bits << (k * kBitsOfStep);
}

template <bool kEachNextValue>
__device__ __forceinline__ void load_chunk(const GaeInputs& in, const Places& places, Loaded& chunk) {
  load_numbers(in.rewards, places, chunk.rewards);
  load_numbers(in.values, places, chunk.values);
  if (kEachNextValue) load_numbers(in.next_values, places, chunk.next_values);
  chunk.flags = 0;
  if (in.mask.data) load_flags(in.mask, places, kKeep, chunk.flags);
  else
    for (int k = 0; k < kPerLane; ++k)
      if (k * kWarpSize + lane_index() < places.count) chunk.flags |= kKeep << (k * kBitsOfStep);
  if (in.dones.data) load_flags(in.dones, places, kDone | kCut, chunk.flags);
  if (in.truncated.data) load_flags(in.truncated, places, kTruncated | kCut, chunk.flags);
}

// A warp's own memory, in which its chunk turns from places k * 32 + lane to four places in a row for each lane, and back.
struct Stage {
  float rewards[kChunk], values[kChunk], next_values[kChunk];
  uint8_t flags[kChunk];
};

// Four places in a row: [0] is the latest.
struct Lane {
  float rewards[kPerLane], values[kPerLane], next_values[kPerLane];
  uint32_t flags;  // a byte each
  __device__ __forceinline__ bool has(int i, uint32_t bit) const { return flags >> (i * kBitsOfStep) & bit; }
};

__device__ __forceinline__ void read_row(const float* from, float (&to)[kPerLane]) {
  const float4 row = reinterpret_cast<const float4*>(from)[lane_index()];
  to[0] = row.x, to[1] = row.y, to[2] = row.z, to[3] = row.w;
}

__device__ __forceinline__ void write_row(float* to, const float (&from)[kPerLane]) {
  reinterpret_cast<float4*>(to)[lane_index()] = make_float4(from[0], from[1], from[2], from[3]);
}

template <bool kEachNextValue>
__device__ __forceinline__ Lane turn(const GaeInputs& in, const Loaded& chunk, Stage& stage) {
  __syncwarp();  // the chunk before has been stored
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
    const int place = k * kWarpSize + lane_index();
    stage.rewards[place] = to_float(chunk.rewards[k], in.rewards.dtype);
    stage.values[place] = to_float(chunk.values[k], in.values.dtype);
    if (kEachNextValue) stage.next_values[place] = to_float(chunk.next_values[k], in.next_values.dtype);
    stage.flags[place] = static_cast<uint8_t>(chunk.flags >> (k * kBitsOfStep));
  }
  __syncwarp();
  Lane lane;
  read_row(stage.rewards, lane.rewards);
  read_row(stage.values, lane.values);
  if (kEachNextValue) read_row(stage.next_values, lane.next_values);
  lane.flags = reinterpret_cast<const uint32_t*>(stage.flags)[lane_index()];
  return lane;
}

// Advantages and returns [flat positions from `first` downwards] of the chunk, by way of its stage.
__device__ __forceinline__ void store_chunk(const float (&advantages)[kPerLane], const float (&returns)[kPerLane], int64_t first, int count, Stage& stage,
                                            float* advantages_out, float* returns_out) {
  write_row(stage.rewards, advantages);
  write_row(stage.values, returns);
  __syncwarp();
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
    const int place = k * kWarpSize + lane_index();
    if (place < count) advantages_out[first - place] = stage.rewards[place], returns_out[first - place] = stage.values[place];
  }
}

// The value of the earliest kept step so far, if there is one.
struct Kept {
  float value;
  bool any;
};

// Of lanes below `lane` (of later steps), the nearest one's `own` if any has one; all lanes take part.
__device__ __forceinline__ Kept nearest_later(const Kept& own, int lane) {
  const unsigned later = __ballot_sync(kFullWarp, own.any) & ((1ull << lane) - 1);
  const int source = later ? kWarpSize - 1 - __clz(static_cast<int>(later)) : 0;
  return {__shfl_sync(kFullWarp, own.value, source), later != 0};
}

// A = offset + factor * (A of what comes later). A factor with its sign bit set marks a cut: what comes later, NaN as well, reaches nothing.
struct Affine {
  float offset, factor;
  __device__ __forceinline__ bool cut() const { return __float_as_int(factor) < 0; }
  __device__ __forceinline__ float operator()(float later) const { return cut() ? offset : fmaf(factor, later, offset); }
};

// Factors of long products stop above 0, which would turn an infinity that comes later into NaN; 0 stays 0 where the decay itself is.
__device__ __forceinline__ float above(float floor, float factor) { return copysignf(fmaxf(fabsf(factor), floor), factor); }

// `now` after `later`. The product of a factor and a cut's is a cut's.
__device__ __forceinline__ Affine compose(const Affine& now, const Affine& later, float floor) {
  return {now(later.offset), now.cut() ? now.factor : above(floor, now.factor * later.factor)};
}

__device__ __forceinline__ Affine shuffle_up(const Affine& x, int delta) {
  return {__shfl_up_sync(kFullWarp, x.offset, delta), __shfl_up_sync(kFullWarp, x.factor, delta)};
}

// Of all lanes' maps: this lane's with those of all later steps, and those of the later steps alone.
struct Scanned {
  Affine inclusive, later;
};

__device__ __forceinline__ Scanned scan(Affine own, float floor) {
#pragma unroll
  for (int delta = 1; delta < kWarpSize; delta *= 2) {
    const Affine later = shuffle_up(own, delta);
    if (lane_index() >= delta) own = compose(own, later, floor);
  }
  const Affine before = shuffle_up(own, 1);
  return {own, lane_index() ? before : Affine{0.0f, 1.0f}};
}

// TD errors of a lane's places, and the map that they make together. `next` is the value of the next kept step.
template <bool kEachNextValue>
__device__ __forceinline__ Affine td_errors(const Lane& lane, Kept next, float gamma, float decay, float floor, float (&deltas)[kPerLane]) {
  Affine map = {0.0f, 1.0f};
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const float following = lane.has(i, kDone) ? 0.0f : kEachNextValue ? lane.next_values[i] : next.value;
    deltas[i] = fmaf(gamma, following, lane.rewards[i]) - lane.values[i];
    // Cut before the last kept step, and no value to bootstrap from.
    if (!kEachNextValue && lane.has(i, kTruncated) && !lane.has(i, kDone) && next.any) deltas[i] = NAN;
    if (!lane.has(i, kKeep)) continue;
    map = lane.has(i, kCut) ? Affine{deltas[i], -1.0f} : Affine{fmaf(decay, map.offset, deltas[i]), decay * map.factor};
    next = {lane.values[i], true};
  }
  return {map.offset, above(floor, map.factor)};
}

// What a tile hands to the one before it, the same in every thread.
struct Carry {
  float advantage;
  Kept next;
};

// What the warps of a tile tell each other. Both are free to be written again when their readers have reached the other's barrier.
template <int kWarps>
struct Exchange {
  Kept kept[kWarps];
  Affine maps[kWarps];
};

// The next kept value after this warp's chunk, and that before the whole tile in `carry`.
template <int kWarps>
__device__ __forceinline__ Kept exchange_kept(const Kept& own, Exchange<kWarps>& exchange, Carry& carry) {
  const int warp = threadIdx.x / kWarpSize;
  if (lane_index() == 0) exchange.kept[warp] = own;
  __syncthreads();
  const Kept of_lane = lane_index() < kWarps ? exchange.kept[lane_index()] : Kept{0.0f, false};
  const Kept later = nearest_later(of_lane, warp), all = nearest_later(of_lane, kWarpSize);
  const Kept before = carry.next;
  if (all.any) carry.next = all;
  return later.any ? later : before;
}

// The advantage after this warp's chunk, and that of the whole tile's first step in `carry`: in order, so that it does not matter how many chunks
// make a tile.
template <int kWarps>
__device__ __forceinline__ float exchange_maps(const Affine& own, Exchange<kWarps>& exchange, Carry& carry) {
  const int warp = threadIdx.x / kWarpSize;
  if (lane_index() == kWarpSize - 1) exchange.maps[warp] = own;
  __syncthreads();
  float mine = carry.advantage;
#pragma unroll 8
  for (int i = 0; i < kWarps; ++i) {
    if (i == warp) mine = carry.advantage;
    carry.advantage = exchange.maps[i](carry.advantage);
  }
  return mine;
}

// The kept value that a lane, and its warp, hand to earlier steps.
__device__ __forceinline__ Kept earliest_kept(const Lane& lane) {
  Kept kept = {0.0f, false};
#pragma unroll
  for (int i = 0; i < kPerLane; ++i)
    if (lane.has(i, kKeep)) kept = {lane.values[i], true};
  return kept;
}

template <bool kEachNextValue, int kWarps>
__device__ __forceinline__ void run_tile(const Lane& lane, float gamma, float decay, Exchange<kWarps>& exchange, Carry& carry,
                                         float (&advantages)[kPerLane], float (&returns)[kPerLane]) {
  const float floor = decay > 0 ? FLT_MIN : 0.0f;
  const Kept own = earliest_kept(lane);
  Kept next = nearest_later(own, lane_index());
  const Kept after = exchange_kept(nearest_later(own, kWarpSize), exchange, carry);
  if (!next.any) next = after;
  float deltas[kPerLane];
  const Scanned maps = scan(td_errors<kEachNextValue>(lane, next, gamma, decay, floor, deltas), floor);
  float advantage = maps.later(exchange_maps(maps.inclusive, exchange, carry));
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const bool keep = lane.has(i, kKeep);
    const float here = lane.has(i, kCut) ? deltas[i] : fmaf(decay, advantage, deltas[i]);
    if (keep) advantage = here;
    advantages[i] = keep ? here : 0.0f;
    returns[i] = keep ? here + lane.values[i] : 0.0f;
  }
}

// NaN in this block's share of all tokens.
__device__ __forceinline__ void fill_nan(int64_t tokens, float* advantages, float* returns) {
  const int64_t share = (tokens + gridDim.x - 1) / gridDim.x, begin = share * blockIdx.x;
  const int64_t end = begin + share < tokens ? begin + share : tokens;
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) advantages[i] = returns[i] = NAN;
}

template <int kThreads, bool kEachNextValue>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    gae_kernel(const GaeInputs in, const Sequences sequences, float* __restrict__ advantages_out, float* __restrict__ returns_out) {
  constexpr int kWarps = kThreads / kWarpSize;
  __shared__ Exchange<kWarps> exchange;
  const int64_t sequence = blockIdx.x, warp = threadIdx.x / kWarpSize;
  Stage& stage = dynamic_shared<Stage>()[warp];
  // Offsets of no sequences, which no block may read beyond, can only be wrong here: the launcher has seen tokens.
  if (sequences.offsets && (sequences.count == 0 || sequences.offsets[0] == kBadOffset)) return fill_nan(sequences.length, advantages_out, returns_out);
  const int64_t begin = sequences.begin(sequence), length = sequences.end(sequence) - begin;
  const Span span = sequences.offsets ? Span{0, begin + length - 1, length} : Span{sequence, length - 1, length};
  const float asked = in.decays ? in.decays[sequence] : in.decay, decay = asked >= 0 ? asked : NAN;
  Carry carry = {0.0f, {in.bootstrap ? in.bootstrap[sequence] : 0.0f, false}};
  Loaded chunk;
  load_chunk<kEachNextValue>(in, span.chunk(warp), chunk);
  for (int64_t tile = 0; tile * kWarps * kChunk < length; ++tile) {
    const int64_t place = (tile * kWarps + warp) * kChunk;
    const Lane lane = turn<kEachNextValue>(in, chunk, stage);
    load_chunk<kEachNextValue>(in, span.chunk((tile + 1) * kWarps + warp), chunk);  // on its way while this one is computed
    float advantages[kPerLane], returns[kPerLane];
    run_tile<kEachNextValue>(lane, in.gamma, decay, exchange, carry, advantages, returns);
    store_chunk(advantages, returns, begin + length - 1 - place, span.chunk(place / kChunk).count, stage, advantages_out, returns_out);
  }
}

template <int kThreads>
cudaError_t launch_gae(const GaeInputs& in, const Sequences& sequences, float* advantages, float* returns, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(sequences.count > 0 ? sequences.count : 1);
  constexpr size_t kSharedBytes = kThreads / kWarpSize * sizeof(Stage);
  const auto kernel = in.next_values.data ? gae_kernel<kThreads, true> : gae_kernel<kThreads, false>;
  return launch(kernel, blocks, kThreads, kSharedBytes, stream, in, sequences, advantages, returns);
}

}  // namespace

cudaError_t gae(const GaeInputs& in, const Sequences& sequences, float* advantages, float* returns, cudaStream_t stream) {
  constexpr int64_t kFewSequences = 132;  // fewer than processors: each sequence needs more loads in flight
  const int64_t tokens = sequences.offsets ? sequences.length : sequences.count * sequences.length;
  if (tokens == 0) return cudaSuccess;
  const int64_t chunks = tokens / kChunk / (sequences.count > 0 ? sequences.count : 1);  // of a sequence, on average
  if (chunks < 2) return launch_gae<32>(in, sequences, advantages, returns, stream);
  if (chunks < 16 || sequences.count > kFewSequences) return launch_gae<256>(in, sequences, advantages, returns, stream);
  return launch_gae<1024>(in, sequences, advantages, returns, stream);
}

}  // namespace fastppo::cuda
