// Generalised advantage estimation, parallel in time. A block walks one sequence from its end in tiles, a chunk of 256 steps a warp:
//
//   A_t = delta_t + c_t * A_{t+1} are affine maps of what comes later; a warp composes its chunk's 256 by a scan, and from chunk to chunk the value
//   itself is handed on, latest chunk first.
//
// Chunks are counted from the sequence's end, so a sequence has the same bits in every batch and packing, whatever the size of the block.
#include <cfloat>

#include "device.h"
#include "launch.h"
#include "launchers.h"

namespace fastppo::cuda {
namespace {

constexpr int kPerLane = 8;
constexpr int kChunk = kWarpSize * kPerLane;
constexpr int kWords = kPerLane / 4;  // of a lane's bytes
constexpr int64_t kMaxSteps = 0x7fff0000;  // of a sequence: what is left of it is counted in 32 bits

// The places of a chunk, 0 the latest step: `first` is its step in the tensors, earlier ones follow downwards. `count` of them exist.
struct Places {
  int64_t row, first;
  int count;
};

// Of the sequence [begin, begin + left), the last chunk. Packed tokens are one long row.
__device__ __forceinline__ Places last_places(const Sequences& sequences, int64_t begin, int left) {
  const int count = min(max(left, 0), kChunk);
  return sequences.offsets ? Places{0, begin + left - 1, count} : Places{blockIdx.x, left - 1, count};
}

__device__ __forceinline__ int lane_index() { return threadIdx.x % kWarpSize; }

// A warp's own memory, in which a chunk turns from places k * 32 + lane, where neighbouring lanes read neighbouring addresses, to eight places in a
// row for each lane, and back. Numbers twice: the next chunk is on its way while one is computed.
template <bool kEpisodes>
struct alignas(16) Stage {
  struct alignas(16) Numbers {
    float rewards[kChunk], values[kChunk], next_values[kEpisodes ? kChunk : 1];
  };
  Numbers numbers[2];
  alignas(8) uint8_t mask[kChunk], dones[kEpisodes ? kChunk : 1], truncated[kEpisodes ? kChunk : 1];
};

// Numbers are staged with neighbouring quads exchanged in every other row of 32: eight lanes that read a quad each then reach all banks.
__device__ __forceinline__ int staged(int k) { return k * kWarpSize + (lane_index() ^ (k % 2 * 4)); }

__device__ __forceinline__ int staged_quad(int quad) { return 2 * lane_index() + (quad ^ (lane_index() / 4 % 2)); }

// x, of which nothing is known before: what follows from it is computed where it is used. Kept in registers over the loop, addresses and strides of
// six inputs would leave none for the rest.
__device__ __forceinline__ Steps computed_here(Steps x) {
#ifdef __CUDACC__
  asm volatile("" : "+l"(x.stride_sequence), "+l"(x.stride_step));
#endif
  return x;
}

// Where an input has place `lane_index()` of a chunk.
template <class T>
__device__ __forceinline__ const T* own_place(const Steps& x, const Places& places) {
  return static_cast<const T*>(x.data) + (places.row * x.stride_sequence + (places.first - lane_index()) * x.stride_step);
}

// Calls body(k, pointer) for this lane's existing places.
template <class T, class Body>
__device__ __forceinline__ void for_places(const Steps& input, const Places& places, const Body& body) {
  const Steps x = computed_here(input);
  const T* p = own_place<T>(x, places);
  const int left = places.count - lane_index();
  if (x.stride_step == 1) {
#pragma unroll
    for (int k = 0; k < kPerLane; ++k)
      if (k * kWarpSize < left) body(k, p - k * kWarpSize);
  } else {
#pragma unroll
    for (int k = 0; k < kPerLane; ++k, p -= kWarpSize * x.stride_step)
      if (k * kWarpSize < left) body(k, p);
  }
}

// fp32 is on its way when this returns; 16-bit types are converted on theirs, and waited for.
__device__ __forceinline__ void load_numbers(const Steps& input, const Places& places, float* to) {
  if (input.dtype == kFloat32) return for_places<float>(input, places, [&](int k, const float* p) { copy_async(to + staged(k), p); });
  const Steps x = computed_here(input);
  const uint16_t* p = own_place<uint16_t>(x, places);
#pragma unroll 4
  for (int k = 0; k < kPerLane; ++k, p -= kWarpSize * x.stride_step)
    if (k * kWarpSize + lane_index() < places.count) to[staged(k)] = x.dtype == kBFloat16 ? bfloat16_to_float(*p) : half_to_float(*p);
}

template <bool kEpisodes>
__device__ __forceinline__ void load_numbers(const GaeInputs& in, const Places& places, typename Stage<kEpisodes>::Numbers& numbers) {
  load_numbers(in.rewards, places, numbers.rewards);
  load_numbers(in.values, places, numbers.values);
  if (kEpisodes && in.next_values.data) load_numbers(in.next_values, places, numbers.next_values);
}

// Bytes of places k * 32 + lane.
struct MaskColumn {
  uint8_t bytes[kPerLane];
};

__device__ __forceinline__ MaskColumn load_mask(const Steps& x, const Places& places) {
  MaskColumn mask;
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) mask.bytes[k] = !x.data && k * kWarpSize + lane_index() < places.count;
  if (x.data) for_places<uint8_t>(x, places, [&](int k, const uint8_t* p) { mask.bytes[k] = *p; });
  return mask;
}

// Bytes of eight places in a row.
struct Bytes {
  uint32_t words[kWords];
  __device__ __forceinline__ bool operator[](int i) const { return words[i / 4] & 0xffu << (i % 4 * 8); }
};

// Eight places in a row: [0] is the latest. Where every step has a next value, the rewards have it in them already.
struct Lane {
  float rewards[kPerLane], values[kPerLane];
  Bytes mask, dones, truncated;
};

__device__ __forceinline__ void read_row(const float* from, float (&to)[kPerLane]) {
#pragma unroll
  for (int quad = 0; quad < kPerLane / 4; ++quad) {
    const float4 row = reinterpret_cast<const float4*>(from)[staged_quad(quad)];
    to[4 * quad] = row.x, to[4 * quad + 1] = row.y, to[4 * quad + 2] = row.z, to[4 * quad + 3] = row.w;
  }
}

__device__ __forceinline__ void write_row(float* to, const float (&from)[kPerLane]) {
#pragma unroll
  for (int quad = 0; quad < kPerLane / 4; ++quad)
    reinterpret_cast<float4*>(to)[staged_quad(quad)] = make_float4(from[4 * quad], from[4 * quad + 1], from[4 * quad + 2], from[4 * quad + 3]);
}

__device__ __forceinline__ Bytes read_bytes(const uint8_t* from) {
  const uint2 row = reinterpret_cast<const uint2*>(from)[lane_index()];
  return {{row.x, row.y}};
}

__device__ __forceinline__ Bytes turn_bytes(const Steps& x, const Places& places, uint8_t* stage) {
  if (!x.data) return {};
  for_places<uint8_t>(x, places, [&](int k, const uint8_t* p) { stage[k * kWarpSize + lane_index()] = *p; });
  __syncwarp();
  return read_bytes(stage);
}

template <bool kEpisodes>
__device__ __forceinline__ Lane read_chunk(const GaeInputs& in, const Places& places, Stage<kEpisodes>& stage, int buffer) {
  const auto& numbers = stage.numbers[buffer];
  Lane lane;
  if (kEpisodes) {
    lane.dones = turn_bytes(in.dones, places, stage.dones);
    lane.truncated = turn_bytes(in.truncated, places, stage.truncated);
  }
  lane.mask = read_bytes(stage.mask);
  read_row(numbers.rewards, lane.rewards);
  read_row(numbers.values, lane.values);
  if (!kEpisodes || !in.next_values.data) return lane;
  float next_values[kPerLane];
  read_row(numbers.next_values, next_values);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) lane.rewards[i] = fmaf(in.gamma, lane.dones[i] ? 0.0f : next_values[i], lane.rewards[i]);
  return lane;
}

// Advantages and returns that the warp has staged, to flat positions from `first` downwards.
template <class Numbers>
__device__ __forceinline__ void store_chunk(const Numbers& stage, int64_t first, int count, float* advantages, float* returns) {
  advantages += first - lane_index(), returns += first - lane_index();
#pragma unroll
  for (int k = 0; k < kPerLane; ++k)
    if (k * kWarpSize + lane_index() < count) advantages[-k * kWarpSize] = stage.rewards[staged(k)], returns[-k * kWarpSize] = stage.values[staged(k)];
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
template <bool kEpisodes>
struct Affine {
  float offset, factor;
  __device__ __forceinline__ bool cut() const { return kEpisodes && __float_as_int(factor) < 0; }
  __device__ __forceinline__ float operator()(float later) const { return cut() ? offset : fmaf(factor, later, offset); }
};

// Factors of long products stop above 0, which would turn an infinity that comes later into NaN; 0 stays 0 where the decay itself is.
template <bool kEpisodes>
__device__ __forceinline__ float above(float floor, float factor) {
  return kEpisodes ? copysignf(fmaxf(fabsf(factor), floor), factor) : fmaxf(factor, floor);
}

// `now` after `later`. The product of a factor and a cut's is a cut's.
template <bool kEpisodes>
__device__ __forceinline__ Affine<kEpisodes> compose(const Affine<kEpisodes>& now, const Affine<kEpisodes>& later, float floor) {
  return {now(later.offset), now.cut() ? now.factor : above<kEpisodes>(floor, now.factor * later.factor)};
}

template <bool kEpisodes>
__device__ __forceinline__ Affine<kEpisodes> shuffle_up(const Affine<kEpisodes>& x, int delta) {
  return {__shfl_up_sync(kFullWarp, x.offset, delta), __shfl_up_sync(kFullWarp, x.factor, delta)};
}

// Of all lanes' maps: this lane's with those of all later steps, and those of the later steps alone.
template <bool kEpisodes>
struct Scanned {
  Affine<kEpisodes> inclusive, later;
};

template <bool kEpisodes>
__device__ __forceinline__ Scanned<kEpisodes> scan(Affine<kEpisodes> own, float floor) {
#pragma unroll
  for (int delta = 1; delta < kWarpSize; delta *= 2) {
    const Affine<kEpisodes> later = shuffle_up(own, delta);
    if (lane_index() >= delta) own = compose(own, later, floor);
  }
  const Affine<kEpisodes> before = shuffle_up(own, 1);
  return {own, lane_index() ? before : Affine<kEpisodes>{0.0f, 1.0f}};
}

// Turns a lane's rewards into TD errors, and makes the map that its places are together. `next` is the value of the next kept step.
template <bool kEpisodes>
__device__ __forceinline__ Affine<kEpisodes> td_errors(Lane& lane, Kept next, bool each_next_value, float gamma, float decay, float floor) {
  Affine<kEpisodes> map = {0.0f, 1.0f};
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const bool done = kEpisodes && lane.dones[i], truncated = kEpisodes && lane.truncated[i] && !done;
    const float rewards = each_next_value ? lane.rewards[i] : fmaf(gamma, done ? 0.0f : next.value, lane.rewards[i]);
    float delta = rewards - lane.values[i];
    // Cut before the last kept step, and no value to bootstrap from.
    if (truncated && !each_next_value && next.any) delta = NAN;
    lane.rewards[i] = delta;
    const Affine<kEpisodes> with = done || truncated ? Affine<kEpisodes>{delta, -1.0f} : Affine<kEpisodes>{fmaf(decay, map.offset, delta), decay * map.factor};
    if (lane.mask[i]) map = with, next = {lane.values[i], true};
  }
  return {map.offset, above<kEpisodes>(floor, map.factor)};
}

// What a tile hands to the one before it, the same in every thread.
struct Carry {
  float advantage;
  Kept next;
};

// What the warps of a tile tell each other. Both are free to be written again when their readers have reached the other's barrier.
template <bool kEpisodes, int kWarps>
struct Exchange {
  Kept kept[kWarps];
  Affine<kEpisodes> maps[kWarps];
};

// The next kept value after this warp's chunk, and that before the whole tile in `carry`.
template <bool kEpisodes, int kWarps>
__device__ __forceinline__ Kept exchange_kept(const Kept& own, Exchange<kEpisodes, kWarps>& exchange, Carry& carry) {
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
template <bool kEpisodes, int kWarps>
__device__ __forceinline__ float exchange_maps(const Affine<kEpisodes>& own, Exchange<kEpisodes, kWarps>& exchange, Carry& carry) {
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

// The kept value that a lane hands to earlier steps.
__device__ __forceinline__ Kept earliest_kept(const Lane& lane) {
  Kept kept = {0.0f, false};
#pragma unroll
  for (int i = 0; i < kPerLane; ++i)
    if (lane.mask[i]) kept = {lane.values[i], true};
  return kept;
}

// Turns a lane's rewards into advantages and its values into returns.
template <bool kEpisodes, int kWarps>
__device__ __forceinline__ void run_tile(Lane& lane, bool each_next_value, float gamma, float decay, Exchange<kEpisodes, kWarps>& exchange, Carry& carry) {
  const float floor = decay > 0 ? FLT_MIN : 0.0f;
  const Kept own = earliest_kept(lane);
  Kept next = nearest_later(own, lane_index());
  const Kept after = exchange_kept(nearest_later(own, kWarpSize), exchange, carry);
  if (!next.any) next = after;
  const Scanned<kEpisodes> maps = scan(td_errors<kEpisodes>(lane, next, each_next_value, gamma, decay, floor), floor);
  float advantage = maps.later(exchange_maps(maps.inclusive, exchange, carry));
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const bool cut = kEpisodes && (lane.dones[i] || lane.truncated[i]);
    const float delta = lane.rewards[i], here = cut ? delta : fmaf(decay, advantage, delta);
    if (lane.mask[i]) advantage = here;
    lane.rewards[i] = lane.mask[i] ? here : 0.0f;
    lane.values[i] = lane.mask[i] ? here + lane.values[i] : 0.0f;
  }
}

// NaN at flat positions [begin, end).
__device__ __forceinline__ void fill_nan(int64_t begin, int64_t end, float* advantages, float* returns) {
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) advantages[i] = returns[i] = NAN;
}

// With wrong offsets no token belongs to a sequence: the blocks share all of them.
__device__ __forceinline__ void fill_share_with_nan(int64_t tokens, float* advantages, float* returns) {
  const int64_t share = (tokens + gridDim.x - 1) / gridDim.x, begin = share * blockIdx.x;
  fill_nan(begin, begin + share < tokens ? begin + share : tokens, advantages, returns);
}

// Blocks of a processor: four of the common case, so that 512 sequences run at once on 132 processors.
constexpr int resident_blocks(int threads, bool episodes) { return episodes ? 512 / threads : threads == 256 ? 4 : 768 / threads; }

// kEpisodes: with dones, truncated or next_values of each step.
template <int kThreads, bool kEpisodes>
__global__ void __launch_bounds__(kThreads, resident_blocks(kThreads, kEpisodes))
    gae_kernel(const GaeInputs in, const Sequences sequences, float* __restrict__ advantages_out, float* __restrict__ returns_out) {
  constexpr int kWarps = kThreads / kWarpSize;
  __shared__ Exchange<kEpisodes, kWarps> exchange;
  const int warp = threadIdx.x / kWarpSize;
  auto& stage = dynamic_shared<Stage<kEpisodes>>()[warp];
  // Where there are tokens, offsets of no sequence are wrong whatever they hold.
  if (sequences.offsets && (sequences.count == 0 || sequences.offsets[0] == kBadOffset))
    return fill_share_with_nan(sequences.length, advantages_out, returns_out);
  const int64_t begin = sequences.begin(blockIdx.x), end = sequences.end(blockIdx.x);
  if (end - begin > kMaxSteps) return fill_nan(begin, end, advantages_out, returns_out);
  const float asked = in.decays ? in.decays[blockIdx.x] : in.decay, decay = asked >= 0 ? asked : NAN;
  Carry carry = {0.0f, {in.bootstrap ? in.bootstrap[blockIdx.x] : 0.0f, false}};
  int left = static_cast<int>(end - begin) - warp * kChunk;  // steps before this warp's later chunks
  load_numbers<kEpisodes>(in, last_places(sequences, begin, left), stage.numbers[0]);
  MaskColumn mask = load_mask(in.mask, last_places(sequences, begin, left));
  for (int buffer = 0; left + warp * kChunk > 0; left -= kWarps * kChunk, buffer ^= 1) {
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) stage.mask[k * kWarpSize + lane_index()] = mask.bytes[k];
    wait_for_copies();
    __syncwarp();
    // The next chunk is on its way while this one is computed; its mask only from there on where registers are free again.
    load_numbers<kEpisodes>(in, last_places(sequences, begin, left - kWarps * kChunk), stage.numbers[buffer ^ 1]);
    Lane lane = read_chunk<kEpisodes>(in, last_places(sequences, begin, left), stage, buffer);
    run_tile<kEpisodes>(lane, in.next_values.data, in.gamma, decay, exchange, carry);
    write_row(stage.numbers[buffer].rewards, lane.rewards);  // all lanes have read theirs: there were barriers
    write_row(stage.numbers[buffer].values, lane.values);
    __syncwarp();
    mask = load_mask(in.mask, last_places(sequences, begin, left - kWarps * kChunk));
    store_chunk(stage.numbers[buffer], begin + left - 1, last_places(sequences, begin, left).count, advantages_out, returns_out);
  }
}

template <int kThreads, bool kEpisodes>
cudaError_t launch_gae(const GaeInputs& in, const Sequences& sequences, float* advantages, float* returns, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(sequences.count > 0 ? sequences.count : 1);
  constexpr size_t kSharedBytes = kThreads / kWarpSize * sizeof(Stage<kEpisodes>);
  return launch(gae_kernel<kThreads, kEpisodes>, blocks, kThreads, kSharedBytes, stream, in, sequences, advantages, returns);
}

template <bool kEpisodes>
cudaError_t choose_threads(const GaeInputs& in, const Sequences& sequences, int64_t tokens, float* advantages, float* returns, cudaStream_t stream) {
  constexpr int64_t kFewSequences = 132;  // no more than processors: each sequence needs more loads in flight
  const int64_t chunks = tokens / kChunk / (sequences.count > 0 ? sequences.count : 1);  // of a sequence, on average
  if (chunks < 2) return launch_gae<32, kEpisodes>(in, sequences, advantages, returns, stream);
  if (chunks < 16 || sequences.count > kFewSequences) return launch_gae<256, kEpisodes>(in, sequences, advantages, returns, stream);
  return launch_gae<512, kEpisodes>(in, sequences, advantages, returns, stream);
}

}  // namespace

cudaError_t gae(const GaeInputs& in, const Sequences& sequences, float* advantages, float* returns, cudaStream_t stream) {
  const int64_t tokens = sequences.offsets ? sequences.length : sequences.count * sequences.length;
  if (tokens == 0) return cudaSuccess;
  const bool episodes = in.next_values.data || in.dones.data || in.truncated.data;
  return (episodes ? choose_threads<true> : choose_threads<false>)(in, sequences, tokens, advantages, returns, stream);
}

}  // namespace fastppo::cuda
