// Generalised advantage estimation, sixteen sequences at a time: the recursion runs backwards in time in one vector lane each, so every advantage
// has the bits of the plain sequential loop, whatever the batch, the padding or the packing. A lane whose sequence is done takes the next one.
#include <type_traits>
#include <utility>

#include "masks.h"
#include "sequences.h"

namespace fastppo::FASTPPO_ISA {
namespace {

constexpr int64_t kTokensWorthAThread = 16384;
constexpr int kGroup = kRegisterBytes / 4, kGroups = kLanes / kGroup;  // lanes of a register
constexpr int kWindow = 64;  // steps of a lane between two looks at where the lanes are: long enough that looking costs little
// Flags of a step: it counts; nothing follows it; the recursion stops behind it.
constexpr uint8_t kKeep = 1, kDone = 2, kCut = 4;

// A lane's share of the current tile: `count` steps from `step` on, in the last of the tile's columns.
struct Window {
  int64_t row, step;
  int count;
  int first() const { return kWindow - count; }
  int64_t offset(const Steps& x) const { return row * x.stride_sequence + step * x.stride_step; }
};

// Which steps the sixteen lanes work on. Packed tokens are one long row.
class Lanes {
 public:
  Lanes(const Sequences& sequences, int64_t first, int64_t last) : sequences_(sequences), next_(first), last_(last) {}

  // Moves every lane to the window before its last one, or to a new sequence after begin(lane, sequence). False when all is done.
  template <class Begin>
  FASTPPO_MEMBER bool advance(const Begin& begin) {
    int longest = 0;
    side_by_side_ = true;
    for (int lane = 0; lane < kLanes; ++lane) {
      advance_lane(lane, begin);
      const Window& w = windows_[lane];
      longest = std::max(longest, w.count);
      side_by_side_ &= w.count == kWindow && w.step == windows_[0].step && w.row == windows_[0].row + lane;
    }
    first_column_ = (kWindow - longest) / kLanes * kLanes;
    return longest > 0;
  }

  const Window& operator[](int lane) const { return windows_[lane]; }
  // The columns before it are empty in every lane.
  int first_column() const { return first_column_; }
  // Sixteen neighbouring rows at the same steps.
  bool side_by_side() const { return side_by_side_; }
  int64_t output(int lane) const { return windows_[lane].row * sequences_.length + windows_[lane].step; }

 private:
  template <class Begin>
  FASTPPO_MEMBER void advance_lane(int lane, const Begin& begin) {
    Window& w = windows_[lane];
    while (remaining_[lane] == 0 && next_ < last_) {
      const int64_t sequence = next_++;
      remaining_[lane] = sequences_.end(sequence) - sequences_.begin(sequence);
      w.row = sequences_.offsets ? 0 : sequence;
      w.step = (sequences_.offsets ? sequences_.begin(sequence) : 0) + remaining_[lane];
      begin(lane, sequence);
    }
    w.count = static_cast<int>(std::min<int64_t>(kWindow, remaining_[lane]));
    w.step -= w.count;
    remaining_[lane] -= w.count;
  }

  const Sequences& sequences_;
  int64_t next_, last_;
  int64_t remaining_[kLanes] = {};
  Window windows_[kLanes] = {};
  int first_column_ = 0;
  bool side_by_side_ = false;
};

// The recursion wants a step as a vector of lanes where memory has a lane as a row of steps: square blocks turn from one into the other in registers.
typedef vfloat::Register GroupFloat;
typedef vint::Register GroupInt;

#if defined(__clang__)
#define FASTPPO_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTPPO_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, GroupInt{__VA_ARGS__})
#endif

#if !defined(__AVX2__) || defined(__AVX512F__)
// a[from], b[from], a[from + 1], b[from + 1], ...
template <int from, class Group, int... i>
FASTPPO_INLINE Group interleaved(const Group& a, const Group& b, std::integer_sequence<int, i...>) {
  return FASTPPO_SHUFFLE(a, b, (from + i / 2 + i % 2 * kGroup)...);
}

#endif

template <class Group>
struct Square {
  Group at[kGroup];

#if defined(__AVX2__) && !defined(__AVX512F__)
  // Squares of 4 x 4 in each half of the registers, then the halves: half the shuffles of interleaving whole registers.
  FASTPPO_MEMBER Square transposed() const {
    Square quads, out;
    for (int k = 0; k < kGroup; k += 4) {
      const Group low0 = FASTPPO_SHUFFLE(at[k], at[k + 1], 0, 8, 1, 9, 4, 12, 5, 13), high0 = FASTPPO_SHUFFLE(at[k], at[k + 1], 2, 10, 3, 11, 6, 14, 7, 15);
      const Group low1 = FASTPPO_SHUFFLE(at[k + 2], at[k + 3], 0, 8, 1, 9, 4, 12, 5, 13);
      const Group high1 = FASTPPO_SHUFFLE(at[k + 2], at[k + 3], 2, 10, 3, 11, 6, 14, 7, 15);
      quads.at[k] = FASTPPO_SHUFFLE(low0, low1, 0, 1, 8, 9, 4, 5, 12, 13), quads.at[k + 1] = FASTPPO_SHUFFLE(low0, low1, 2, 3, 10, 11, 6, 7, 14, 15);
      quads.at[k + 2] = FASTPPO_SHUFFLE(high0, high1, 0, 1, 8, 9, 4, 5, 12, 13), quads.at[k + 3] = FASTPPO_SHUFFLE(high0, high1, 2, 3, 10, 11, 6, 7, 14, 15);
    }
    for (int k = 0; k < 4; ++k) {
      out.at[k] = FASTPPO_SHUFFLE(quads.at[k], quads.at[k + 4], 0, 1, 2, 3, 8, 9, 10, 11);
      out.at[k + 4] = FASTPPO_SHUFFLE(quads.at[k], quads.at[k + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
    return out;
  }
#else

  // Each pass interleaves the rows of the two halves, which turns row and column numbers, taken as one binary number, by one bit.
  FASTPPO_MEMBER Square transposed() const {
    constexpr auto kIndices = std::make_integer_sequence<int, kGroup>();
    Square block = *this;
    for (int pass = 1; pass < kGroup; pass *= 2) {
      Square next;
      for (int k = 0; k < kGroup / 2; ++k) {
        next.at[2 * k] = interleaved<0>(block.at[k], block.at[k + kGroup / 2], kIndices);
        next.at[2 * k + 1] = interleaved<kGroup / 2>(block.at[k], block.at[k + kGroup / 2], kIndices);
      }
      block = next;
    }
    return block;
  }
#endif
};

template <class Group, class T>
FASTPPO_INLINE Group load_group(const T* p) {
  Group group;
  std::memcpy(&group, p, sizeof group);
  return group;
}

// Sixteen steps of a group of lanes from column `column` on: a cache line of each row, which is read at once, as rows that lie a power of two apart push
// each other out of L1.
template <class Group>
struct Block {
  Group at[kLanes];

  template <class T>
  FASTPPO_MEMBER void load(const T* const* rows, int column) {
    for (int step = 0; step < kLanes; step += kGroup) {
      Square<Group> square;
      for (int k = 0; k < kGroup; ++k) square.at[k] = load_group<Group>(rows[k] + column + step);
      square = square.transposed();
      for (int k = 0; k < kGroup; ++k) at[step + k] = square.at[k];
    }
  }
};

// Where each lane's window of an input lies: in the tensor itself, or converted and gathered here with zeros outside the window.
template <class T>
struct Inputs {
  const T* row[kLanes];
  alignas(64) T staged[kLanes][kWindow];
};

// Time-major memory: a step of sixteen neighbouring sequences is a vector already.
template <class Storage>
void locate_time_major(const typename Storage::type* p, int64_t stride_step, Inputs<float>& inputs) {
  alignas(64) float steps[kWindow][kLanes];
  const float* rows[kWindow];
  for (int k = 0; k < kWindow; ++k) {
    F32::store(steps[k], Storage::load(p + k * stride_step));
    rows[k] = steps[k];
  }
  for (int lane = 0; lane < kLanes; ++lane) inputs.row[lane] = inputs.staged[lane];
  for (int column = 0; column < kWindow; column += kGroup) {
    Block<GroupFloat> turned;  // whose steps are lanes here
    turned.load(rows + column, 0);
    for (int lane = 0; lane < kLanes; ++lane) std::memcpy(&inputs.staged[lane][column], &turned.at[lane], sizeof(GroupFloat));
  }
}

template <class Storage>
void locate(const Steps& x, const Lanes& lanes, Inputs<float>& inputs) {
  using T = typename Storage::type;
  if (x.stride_sequence == 1 && x.stride_step != 1 && lanes.side_by_side())
    return locate_time_major<Storage>(static_cast<const T*>(x.data) + lanes[0].offset(x), x.stride_step, inputs);
  for (int lane = 0; lane < kLanes; ++lane) {
    const Window& w = lanes[lane];
    const T* p = static_cast<const T*>(x.data) + w.offset(x);
    const bool vector = x.stride_step == 1 && w.count == kWindow;
    if (vector && std::is_same<Storage, F32>::value) {
      inputs.row[lane] = reinterpret_cast<const float*>(p);
      continue;
    }
    T buffer[kWindow] = {};
    if (!vector)
      for (int k = 0; k < w.count; ++k) buffer[w.first() + k] = p[k * x.stride_step];
    for (int column = 0; column < kWindow; column += kLanes)
      F32::store(inputs.staged[lane] + column, Storage::load((vector ? p : buffer) + column));
    inputs.row[lane] = inputs.staged[lane];
  }
}

void locate(const Steps& x, const Lanes& lanes, Inputs<float>& inputs) {
  with_storage(x.dtype, [&](auto storage) { locate<decltype(storage)>(x, lanes, inputs); });
}

// Where each lane's outputs go: into the tensor itself, or by way of here when the window is shorter.
struct Outputs {
  float* row[kLanes];
  alignas(64) float staged[kLanes][kWindow];

  void locate(float* out, const Lanes& lanes) {
    for (int lane = 0; lane < kLanes; ++lane) row[lane] = lanes[lane].count == kWindow ? out + lanes.output(lane) : staged[lane];
  }
  void finish(float* out, const Lanes& lanes) const {
    for (int lane = 0; lane < kLanes; ++lane) {
      const Window& w = lanes[lane];
      if (w.count < kWindow) std::memcpy(out + lanes.output(lane), staged[lane] + w.first(), w.count * sizeof(float));
    }
  }
};

// Sets `flag` in each column of the window whose byte is set. In a loop, which vectorises: comparisons of vectors wider than the machine's GCC splits
// into scalars.
FASTPPO_INLINE void add_flag(const Steps& x, const Window& w, uint8_t flag, uint8_t* codes) {
  if (!x.data) return;
  const auto* p = static_cast<const uint8_t*>(x.data) + w.offset(x);
  uint8_t bytes[kWindow] = {};
  if (x.stride_step == 1 && w.count == kWindow) std::memcpy(bytes, p, kWindow);
  else
    for (int k = 0; k < w.count; ++k) bytes[w.first() + k] = p[k * x.stride_step];
  for (int k = 0; k < kWindow; ++k) codes[k] |= bytes[k] != 0 ? flag : 0;
}

enum class TileKind { kPlain, kMixed, kMasked };  // every step counts and none ends an episode; anything; no step counts

// Finds out the tile's kind and, where it is mixed, the flags of each step.
TileKind load_flags(const GaeInputs& in, const Lanes& lanes, Inputs<int32_t>& flags) {
  if (!in.mask.data && !in.dones.data && !in.truncated.data) return TileKind::kPlain;
  uint8_t codes[kLanes][kWindow], any[kWindow] = {}, all[kWindow];
  std::memset(all, kKeep, kWindow);
  for (int lane = 0; lane < kLanes; ++lane) {
    const Window& w = lanes[lane];
    std::memset(codes[lane], w.count && !in.mask.data ? kKeep : 0, kWindow);
    if (!w.count) continue;
    add_flag(in.mask, w, kKeep, codes[lane]);
    add_flag(in.dones, w, kDone | kCut, codes[lane]);
    add_flag(in.truncated, w, kCut, codes[lane]);
    for (int k = 0; k < kWindow; ++k) any[k] |= codes[lane][k], all[k] &= codes[lane][k];
  }
  uint8_t some = 0, every = kKeep;
  for (int k = lanes.first_column(); k < kWindow; ++k) some |= any[k], every &= all[k];
  if (some == kKeep && every == kKeep) return TileKind::kPlain;
  if (!(some & kKeep)) return TileKind::kMasked;
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int column = 0; column < kWindow; column += kLanes) {
      const vint wide = load_bytes(codes[lane] + column);
      std::memcpy(flags.staged[lane] + column, &wide, sizeof wide);
    }
    flags.row[lane] = flags.staged[lane];
  }
  return TileKind::kMixed;
}

// What a lane carries from a step to the one before it.
struct Carry {
  GroupFloat gae, next_value, decay;
};

struct TileData {
  Inputs<float> rewards, values, next_values;
  Inputs<int32_t> flags;
  Outputs advantages, returns;
};

// Writes sixteen steps of a group of lanes, a cache line of each row at once.
template <bool kMixed>
FASTPPO_INLINE void store_block(const TileData& tile, const Block<GroupFloat>& advantages, int lane, int column) {
  Square<GroupFloat> rows[kGroups];
  for (int part = 0; part < kGroups; ++part) {
    for (int k = 0; k < kGroup; ++k) rows[part].at[k] = advantages.at[part * kGroup + k];
    rows[part] = rows[part].transposed();
  }
  for (int k = 0; k < kGroup; ++k)
    for (int part = 0; part < kGroups; ++part) {
      const int at = column + part * kGroup;
      GroupFloat advantage = rows[part].at[k], target = advantage + load_group<GroupFloat>(tile.values.row[lane + k] + at);
      if (kMixed) {
        const GroupInt keep = (load_group<GroupInt>(tile.flags.row[lane + k] + at) & kKeep) != 0;
        advantage = keep ? advantage : GroupFloat{};
        target = keep ? target : GroupFloat{};
      }
      std::memcpy(tile.advantages.row[lane + k] + at, &advantage, sizeof advantage);
      std::memcpy(tile.returns.row[lane + k] + at, &target, sizeof target);
    }
}

// Sixteen steps of a group of lanes, the latest first.
template <bool kMixed, bool kNextValues>
FASTPPO_INLINE void run_block(float gamma, const TileData& tile, int lane, int column, Carry& carry) {
  const GroupFloat zero = {};
  Block<GroupFloat> rewards, values, next_values, advantages;
  Block<GroupInt> flags;
  rewards.load(tile.rewards.row + lane, column);
  values.load(tile.values.row + lane, column);
  if (kNextValues) next_values.load(tile.next_values.row + lane, column);
  if (kMixed) flags.load(tile.flags.row + lane, column);
  for (int k = kLanes - 1; k >= 0; --k) {
    GroupFloat next = kNextValues ? next_values.at[k] : carry.next_value, later = carry.gae;
    if (kMixed) {
      next = (flags.at[k] & kDone) != 0 ? zero : next;
      later = (flags.at[k] & kCut) != 0 ? zero : later;
    }
    advantages.at[k] = ((rewards.at[k] + gamma * next) - values.at[k]) + carry.decay * later;
    const GroupInt keep = kMixed ? (flags.at[k] & kKeep) != 0 : GroupInt{};
    carry.gae = kMixed ? (keep ? advantages.at[k] : carry.gae) : advantages.at[k];
    carry.next_value = kMixed ? (keep ? values.at[k] : carry.next_value) : values.at[k];
  }
  store_block<kMixed>(tile, advantages, lane, column);
}

// Asks L2 for what a group of lanes reads a window from now, which the hardware does not foresee: rows are read backwards, too many at a time. In L1
// the lines of rows a power of two apart would push each other out, and all requests of a window at once would wait for each other. An address
// before the tensor is harmless: a prefetch never faults.
FASTPPO_INLINE void prefetch_earlier(const TileData& tile, int lane, int column) {
  for (int k = lane; k < lane + kGroup; ++k) {
    __builtin_prefetch(tile.rewards.row[k] + column - kWindow, 0, 2);
    __builtin_prefetch(tile.values.row[k] + column - kWindow, 0, 2);
  }
}

// A group of lanes is finished before the next: sixteen rows of four tensors at a time are more than the hardware follows.
template <bool kMixed, bool kNextValues>
void run_tile(float gamma, const TileData& tile, int first_column, Carry (&carry)[kGroups]) {
  for (int q = 0; q < kGroups; ++q) {
    Carry running = carry[q];  // in registers
    for (int column = kWindow - kLanes; column >= first_column; column -= kLanes) {
      prefetch_earlier(tile, q * kGroup, column);
      run_block<kMixed, kNextValues>(gamma, tile, q * kGroup, column, running);
    }
    carry[q] = running;
  }
}

template <bool kNextValues>
void gae_range(const GaeInputs& in, const Sequences& sequences, float* advantages, float* returns, int64_t first, int64_t last) {
  Lanes lanes(sequences, first, last);
  Carry carry[kGroups] = {};
  const auto begin = [&](int lane, int64_t sequence) {
    Carry& group = carry[lane / kGroup];
    group.gae[lane % kGroup] = 0;
    group.next_value[lane % kGroup] = in.bootstrap ? in.bootstrap[sequence] : 0;
    group.decay[lane % kGroup] = in.decays ? in.decays[sequence] : in.decay;
  };
  TileData tile;
  while (lanes.advance(begin)) {
    const TileKind kind = load_flags(in, lanes, tile.flags);
    if (kind == TileKind::kMasked) {
      for (int lane = 0; lane < kLanes; ++lane)
        for (float* out : {advantages, returns}) std::memset(out + lanes.output(lane), 0, lanes[lane].count * sizeof(float));
      continue;
    }
    locate(in.rewards, lanes, tile.rewards);
    locate(in.values, lanes, tile.values);
    if (kNextValues) locate(in.next_values, lanes, tile.next_values);
    tile.advantages.locate(advantages, lanes);
    tile.returns.locate(returns, lanes);
    (kind == TileKind::kMixed ? run_tile<true, kNextValues> : run_tile<false, kNextValues>)(in.gamma, tile, lanes.first_column(), carry);
    tile.advantages.finish(advantages, lanes);
    tile.returns.finish(returns, lanes);
  }
}

// The byte of sequence i's step t, or `absent`.
FASTPPO_INLINE bool flag_at(const Steps& x, const Sequences& sequences, int64_t i, int64_t t, bool absent) {
  if (!x.data) return absent;
  const int64_t row = sequences.offsets ? 0 : i, step = sequences.offsets ? sequences.offsets[i] + t : t;
  return static_cast<const uint8_t*>(x.data)[row * x.stride_sequence + step * x.stride_step];
}

// The first set step of sequence i in [t, last), or `last`; eight empty bytes cost one look.
int64_t next_set(const Steps& x, const Sequences& sequences, int64_t i, int64_t t, int64_t last) {
  const auto* row = static_cast<const uint8_t*>(x.data) + (sequences.offsets ? sequences.offsets[i] : i * x.stride_sequence);
  while (t < last) {
    uint64_t eight = 1;
    if (x.stride_step == 1 && t + 8 <= last) std::memcpy(&eight, row + t, sizeof eight);
    if (eight == 0) t += 8;
    else if (flag_at(x, sequences, i, t, false)) return t;
    else ++t;
  }
  return last;
}

}  // namespace

void gae(const GaeInputs& in, const Sequences& sequences, float* advantages, float* returns, int threads) {
  parallel_sequences(sequences, threads, kTokensWorthAThread, [&](int64_t first, int64_t last) {
    (in.next_values.data ? gae_range<true> : gae_range<false>)(in, sequences, advantages, returns, first, last);
  });
}

int64_t first_unbootstrapped_truncation(const Steps& mask, const Steps& dones, const Steps& truncated, const Sequences& sequences) {
  for (int64_t i = 0; i < sequences.count; ++i) {
    int64_t last = sequences.end(i) - sequences.begin(i) - 1;
    while (last >= 0 && !flag_at(mask, sequences, i, last, true)) --last;
    for (int64_t t = next_set(truncated, sequences, i, 0, last); t < last; t = next_set(truncated, sequences, i, t + 1, last))
      if (flag_at(mask, sequences, i, t, true) && !flag_at(dones, sequences, i, t, false)) return sequences.begin(i) + t;
  }
  return -1;
}

}  // namespace fastppo::FASTPPO_ISA
