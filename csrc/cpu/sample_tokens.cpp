// One token for each row of logits. All sums that decide are integers: the choice is the same for every order, thread count and chip.
// fastppo/reference/sample_tokens.py is the specification, bit for bit.
#include <algorithm>
#include <functional>
#include <limits>
#include <vector>

#include "../sampling_math.h"
#include "online_softmax.h"
#include "parallel.h"

namespace fastppo::FASTPPO_ISA {
namespace {

constexpr int kBins = 512;

// Sum of mass_of over vectors of e.
class MassSum {
  typedef float Floats __attribute__((vector_size(kRegisterBytes / 2)));
  typedef double Doubles __attribute__((vector_size(kRegisterBytes)));
  typedef uint64_t Bits __attribute__((vector_size(kRegisterBytes)));
  Bits sums_[2] = {};
  uint64_t vectors_ = 0;

 public:
  FASTPPO_MEMBER void add(const vfloat& e) {
    for (int i = 0; i < 2 * vfloat::kParts; ++i) {
      Floats half;
      std::memcpy(&half, reinterpret_cast<const char*>(&e) + i * sizeof half, sizeof half);
      sums_[i % 2] += reinterpret_cast<Bits>(__builtin_convertvector(half, Doubles) + kMassShifter);
    }
    ++vectors_;
  }
  FASTPPO_MEMBER uint64_t total() const {
    const Bits both = sums_[0] + sums_[1];
    uint64_t sum = 0;
    for (size_t i = 0; i < kRegisterBytes / sizeof(uint64_t); ++i) sum += both[i];
    return sum - vectors_ * kLanes * kMassShifterBits;
  }
};

struct Weighted {
  uint32_t key;
  uint64_t weight;
};

// The largest t for which the weights of {key >= t} reach `need`, which all together do. A radix select over 256 bins of the keys that are left: at
// most five narrowings, each over fewer items. `items` is used up.
uint32_t select_key(std::vector<Weighted>& items, uint64_t need) {
  uint32_t low = 0, high = ~0u;
  while (low < high) {
    low = ~0u, high = 0;
    for (const Weighted& item : items) low = std::min(low, item.key), high = std::max(high, item.key);
    int shift = 0;
    while ((high - low) >> shift > 255) ++shift;
    uint64_t bins[256] = {};
    for (const Weighted& item : items) bins[(item.key - low) >> shift] += item.weight;
    uint32_t bin = (high - low) >> shift;
    for (; bins[bin] < need; --bin) need -= bins[bin];
    const auto outside = [=](const Weighted& item) { return (item.key - low) >> shift != bin; };
    items.erase(std::remove_if(items.begin(), items.end(), outside), items.end());
  }
  return low;
}

// A thread's memory, used for one row after the other.
struct Scratch {
  std::vector<uint64_t> block_mass;  // of each block of kSoftmaxBlock logits
  std::vector<float> block_base;     // the maximum that block_mass refers to
  std::vector<float> block_max;      // its largest z
  std::vector<float> lane_max;       // [blocks, kLanes] each lane's largest z
  std::vector<Weighted> items;
  std::vector<float> order;
  explicit Scratch(int64_t width) {
    const size_t blocks = (width + kSoftmaxBlock - 1) / kSoftmaxBlock;
    block_mass.resize(blocks), block_base.resize(blocks), block_max.resize(blocks), lane_max.resize(blocks * kLanes);
  }
};

// Keeps what the one read of the row has at hand: masses relative to the maximum so far, and the lanes' maxima.
struct KeepBlocks {
  static constexpr bool kWanted = true;
  Scratch& scratch;
  FASTPPO_MEMBER void operator()(int64_t block, int vectors, const vfloat& lane_max, float base, const vfloat* e) const {
    MassSum sum;
    for (int i = 0; i < vectors; ++i) sum.add(e[i]);
    scratch.block_mass[block] = sum.total();
    scratch.block_base[block] = base;
    scratch.block_max[block] = max_lanes(lane_max);
    std::memcpy(&scratch.lane_max[block * kLanes], &lane_max, sizeof lane_max);
  }
};

template <class Storage>
class RowSampler {
  using T = typename Storage::type;
  const T* row_;
  const int64_t width_;
  const LogitTransform transform_;
  const RowParameters& p_;
  Scratch& s_;
  SoftmaxStats stats_;
  // Kept are tokens with z >= least_z_ and exp(z - max z) >= least_e_.
  float least_z_ = -kInfinity, least_e_ = 0;

 public:
  RowSampler(const T* row, int64_t width, const RowParameters& p, Scratch& scratch)
      : row_(row), width_(width), transform_{1.0f, 0.0f, divisor(p)}, p_(p), s_(scratch) {
    stats_ = row_softmax<Storage, false, false>(row, width, transform_, KeepBlocks{s_});
  }

  void sample(const SampledRows& out, int64_t i) {
    if (stats_.rest != stats_.rest) return error(out, i);
    if (p_.temperature == 0) return finish(out, i, first_largest(), 1, 1);
    const uint64_t total = total_mass();
    const uint64_t kept = has_filters(p_, width_) ? filter(total) : total;
    finish(out, i, draw(multiply_high(p_.uniform, kept)), kept, total);
  }

  static void error(const SampledRows& out, int64_t i) {
    out.tokens[i] = -1;
    out.logprobs[i] = out.processed_logprobs[i] = __builtin_nanf("");
    out.kept_mass[i] = 0;
  }

 private:
  int64_t blocks() const { return static_cast<int64_t>(s_.block_mass.size()); }

  // Calls body(begin, x) for each 16 logits of a block until it returns true; lanes beyond the row are -inf.
  template <class Body>
  FASTPPO_MEMBER bool each_raw_vector(int64_t block, const Body& body) const {
    const int64_t end = std::min(width_, (block + 1) * kSoftmaxBlock);
    int64_t begin = block * kSoftmaxBlock;
    for (; begin + kLanes <= end; begin += kLanes)
      if (body(begin, Storage::load(row_ + begin))) return true;
    return begin < end && body(begin, load_tail<Storage>(row_ + begin, static_cast<int>(end - begin), -kInfinity));
  }

  // The same with z = x / temperature.
  template <class Body>
  FASTPPO_MEMBER bool each_vector(int64_t block, const Body& body) const {
    return each_raw_vector(block, [&](int64_t begin, const vfloat& x) { return body(begin, apply_transform<false>(x, transform_)); });
  }

  void finish(const SampledRows& out, int64_t i, int64_t token, uint64_t kept, uint64_t total) const {
    const double shifted = static_cast<double>(transform_scalar(load_tail<Storage>(row_ + token, 1, 0)[0], transform_)) - stats_.max;
    out.tokens[i] = token;
    out.logprobs[i] = static_cast<float>(shifted - stats_.log_sum());
    // All mass kept: the same distribution, so the same number.
    out.processed_logprobs[i] = kept == total ? out.logprobs[i] : static_cast<float>(shifted - std::log(kept / kMassScale));
    out.kept_mass[i] = static_cast<float>(static_cast<double>(kept) / static_cast<double>(total));
  }

  int64_t first_largest() const {
    int64_t found = -1;
    for (int64_t block = 0; found < 0; ++block) {
      if (s_.block_max[block] != stats_.max) continue;
      each_vector(block, [&](int64_t begin, const vfloat& z) {
        const uint32_t bits = lane_bits(z == stats_.max);
        if (bits) found = begin + __builtin_ctz(bits);
        return bits != 0;
      });
    }
    return found;
  }

  // Blocks that the read met before the maximum had their masses taken against a smaller one: these are done again.
  uint64_t total_mass() {
    uint64_t total = 0;
    for (int64_t block = 0; block < blocks(); ++block) {
      if (s_.block_base[block] != stats_.max) {
        MassSum sum;
        each_vector(block, [&](int64_t begin, const vfloat& z) {
          sum.add(vexp_nonpositive(z - stats_.max));
          return false;
        });
        s_.block_mass[block] = sum.total();
      }
      total += s_.block_mass[block];
    }
    return total;
  }

  FASTPPO_MEMBER vfloat kept_exps(const vfloat& z) const {
    const vfloat e = vexp_nonpositive(z - stats_.max);
    return select((z >= least_z_) & (e >= least_e_), e, vfloat(0.0f));
  }

  // Calls body(begin, z) for each vector that holds a z >= least_z_, and perhaps for some more.
  template <class Body>
  FASTPPO_MEMBER void each_kept_vector(const Body& body) const {
    const double bound = (static_cast<double>(least_z_) - 0x1p-149) * transform_.temperature;
    const float raw_bound = static_cast<float>(bound - 1e-6 * std::abs(bound));  // most vectors are passed over without the division
    for (int64_t block = 0; block < blocks(); ++block) {
      if (s_.block_max[block] < least_z_) continue;
      each_raw_vector(block, [&](int64_t begin, const vfloat& x) {
        if (lane_bits(x >= raw_bound)) body(begin, apply_transform<false>(x, transform_));
        return false;
      });
    }
  }

  // Sets the blocks' masses to those of the kept tokens, and returns the sum.
  uint64_t kept_mass() {
    std::fill(s_.block_mass.begin(), s_.block_mass.end(), 0);
    uint64_t sum = 0;
    each_kept_vector([&](int64_t begin, const vfloat& z) {
      MassSum mass;
      mass.add(kept_exps(z));
      s_.block_mass[begin / kSoftmaxBlock] += mass.total();
    });
    for (uint64_t mass : s_.block_mass) sum += mass;
    return sum;
  }

  // The first token whose cumulative kept mass exceeds `target`, which is below the kept mass.
  int64_t draw(uint64_t target) const {
    int64_t block = 0;
    for (; target >= s_.block_mass[block]; ++block) target -= s_.block_mass[block];
    int64_t token = 0;
    each_vector(block, [&](int64_t begin, const vfloat& z) {
      const vfloat e = kept_exps(z);
      MassSum sum;
      sum.add(e);
      if (target >= sum.total()) return target -= sum.total(), false;
      for (token = begin; target >= mass_of(e[token - begin]); ++token) target -= mass_of(e[token - begin]);
      return true;
    });
    return token;
  }

  // Top-k, then top-p, then min-p: narrows to the kept tokens and returns their mass.
  uint64_t filter(uint64_t total) {
    const bool top_k = has_top_k(p_, width_);
    least_z_ = least_kept(p_, stats_.max, total, width_);
    if (top_k) {
      least_z_ = std::max(least_z_, lane_bound());
      least_z_ = threshold<false>(p_.top_k);
    }
    if (p_.top_p < 1) least_z_ = threshold<true>(top_p_mass(p_.top_p, top_k ? kept_mass() : total));
    least_e_ = p_.min_p;
    return kept_mass();
  }

  // k lanes whose maximum is >= t hold k logits >= t: the k-th largest z is not below the result.
  float lane_bound() {
    if (p_.top_k > static_cast<int64_t>(s_.lane_max.size())) return -kInfinity;
    s_.order = s_.lane_max;
    std::nth_element(s_.order.begin(), s_.order.begin() + (p_.top_k - 1), s_.order.end(), std::greater<float>());
    return s_.order[p_.top_k - 1];
  }

  // The largest t for which {z >= t} among the tokens kept so far weighs `need` (mass, or else number); least_z_ where all of them weigh less.
  // A histogram over even bins from the maximum down names the bin, whose tokens alone are then looked at one by one.
  template <bool kMass>
  float threshold(uint64_t need) {
    if (!(least_z_ < stats_.max)) return least_z_;
    // Finite also where all is within denormals of the maximum: 0 * inf has no bin.
    const float scale = std::min(kBins / (stats_.max - least_z_), std::numeric_limits<float>::max());
    uint64_t bins[kBins + 2] = {};
    each_weight<kMass>(scale, kAllBins, [&](int bin, float, uint64_t weight) { bins[bin] += weight; });
    int bin = 0;
    for (; bin < kBins + 2 && bins[bin] < need; ++bin) need -= bins[bin];
    if (bin == kBins + 2) return least_z_;
    s_.items.clear();
    each_weight<kMass>(scale, bin, [&](int, float z, uint64_t weight) { s_.items.push_back({order_key(z), weight}); });
    return from_order_key(select_key(s_.items, need));
  }

  // Calls body(bin, z, weight) for each token kept so far, in one bin or in all. The bin, round((max - z) * scale), never falls as z falls: each of
  // its steps is monotone.
  static constexpr int kAllBins = -1;
  template <bool kMass, class Body>
  FASTPPO_MEMBER void each_weight(float scale, int only, const Body& body) const {
    each_kept_vector([&](int64_t, const vfloat& z) {
      const vint bin = bit_cast<int32_t>((stats_.max - z) * scale + kShifter) - bit_cast<int32_t>(vfloat(kShifter));
      const vint chosen = only == kAllBins ? z >= least_z_ : (z >= least_z_) & (bin == only);
      uint32_t bits = lane_bits(chosen);
      if (!bits) return;
      const vfloat e = kMass ? vexp_nonpositive(z - stats_.max) : vfloat(1.0f);
      for (; bits; bits &= bits - 1) {
        const int lane = __builtin_ctz(bits);
        body(bin[lane], z[lane], kMass ? mass_of(e[lane]) : 1);
      }
    });
  }
};

}  // namespace

void sample_tokens(const Rows& logits, const SamplingParameters& parameters, const SampledRows& out, int threads) {
  parallel_ranges(logits.count(), threads, 1, [&](int64_t first, int64_t last) {
    with_storage(logits.dtype, [&](auto storage) {
      using Storage = decltype(storage);
      const auto* data = static_cast<const typename Storage::type*>(logits.data);
      Scratch scratch(logits.width);
      for (int64_t i = first; i < last; ++i) {
        const RowParameters p{parameters.temperature[i], parameters.top_k[i], parameters.top_p[i], parameters.min_p[i],
                              philox(parameters.seed, parameters.sequence_ids[i], parameters.positions[i])};
        if (valid(p)) RowSampler<Storage>(data + logits.offset(i), logits.width, p, scratch).sample(out, i);
        else RowSampler<Storage>::error(out, i);
      }
    });
  });
}

}  // namespace fastppo::FASTPPO_ISA
