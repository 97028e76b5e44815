// Log-probability of each row's label, and the row's entropy, in one read of the logits; the gradient in one more read and one write.
#include "online_softmax.h"
#include "parallel.h"

namespace fastppo::FASTPPO_ISA {
namespace {

template <class Storage>
void forward_rows(const Rows& logits, const int64_t* labels, int64_t ignore_index, const LogitTransform& t, float* logprobs, float* entropy, float* max_logsum,
                  int64_t first, int64_t last) {
  const auto* data = static_cast<const typename Storage::type*>(logits.data);
  for (int64_t i = first; i < last; ++i) {
    if (labels[i] == ignore_index) {
      logprobs[i] = max_logsum[2 * i] = max_logsum[2 * i + 1] = 0;
      if (entropy) entropy[i] = 0;
      continue;
    }
    const auto* row = data + logits.offset(i);
    const SoftmaxStats stats = row_softmax<Storage>(row, logits.width, t, entropy != nullptr);
    const float z = transform_scalar(load_tail<Storage>(row + labels[i], 1, 0)[0], t);
    const double log_sum = stats.log_sum();
    logprobs[i] = static_cast<float>((static_cast<double>(z) - stats.max) - log_sum);
    max_logsum[2 * i] = stats.max;
    max_logsum[2 * i + 1] = static_cast<float>(log_sum);
    if (entropy) entropy[i] = stats.entropy();
  }
}

void add_tile_rows(const float* tile, const int64_t* labels, int64_t width, const LogitTransform& t, bool entropy, PartialRow* state, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    SoftmaxStats stats{static_cast<float>(state[i].max), state[i].rest, state[i].weighted};
    add_to_softmax<F32>(stats, tile + i * width, width, t, entropy);
    const bool here = labels[i] >= 0 && labels[i] < width;
    state[i] = {stats.max, stats.rest, stats.weighted, here ? transform_scalar(tile[i * width + labels[i]], t) : state[i].label_z};
  }
}

// What one row's gradient needs besides its logits.
struct RowGradient {
  float max, log_sum, entropy, d_logprob, d_entropy;
};

// dz/dx at z(x) for x in the storage type's values.
template <bool kSoftcap>
FASTPPO_INLINE vfloat transform_slope(const vfloat& x, const LogitTransform& t) {
  const vfloat slope = t.scale / t.temperature;
  if (!kSoftcap) return slope;
  const vfloat th = vtanh(x * t.scale / t.softcap);
  return slope * (1.0f - th * th);
}

template <class Storage, bool kEntropy, bool kSoftcap>
void backward_row(const typename Storage::type* row, typename Storage::type* grad, int64_t width, int64_t label, const LogitTransform& t,
                  const RowGradient& g) {
  // d logprob / dz = onehot - p (the onehot is added below); d H / dz = -p (log p + H); p = 0 contributes 0 though log p is -inf.
  auto without_onehot = [&](const vfloat& x) {
    const vfloat logp = (apply_transform<kSoftcap>(x, t) - g.max) - g.log_sum;
    const vfloat p = vexp_nonpositive(logp);
    vfloat dz = -g.d_logprob * p;
    if (kEntropy) dz -= select(p == 0.0f, vfloat(0.0f), g.d_entropy * p * (logp + g.entropy));
    return select(dz == 0.0f, vfloat(0.0f), dz * transform_slope<kSoftcap>(x, t));  // where p is 0 the slope may be NaN
  };
  const bool label_here = label >= 0 && label < width;
  const vfloat label_logit = load_tail<Storage>(row + (label_here ? label : 0), 1, 0);  // before an in-place write replaces it
  int64_t v = 0;
  for (; v + kLanes <= width; v += kLanes) Storage::store(grad + v, without_onehot(Storage::load(row + v)));
  if (v < width) {
    const int rest = static_cast<int>(width - v);
    store_tail<Storage>(grad + v, rest, without_onehot(load_tail<Storage>(row + v, rest, 0)));
  }
  if (!label_here) return;
  // The label's entry with its onehot, added in fp32 before the one rounding; 1 - p = -expm1(log p) does not cancel where p is near 1.
  const float logp = (apply_transform<kSoftcap>(label_logit, t)[0] - g.max) - g.log_sum;
  const float p = vexp_nonpositive(logp)[0];
  float dz = g.d_logprob * static_cast<float>(-std::expm1(static_cast<double>(logp)));
  if (kEntropy && p != 0) dz -= g.d_entropy * p * (logp + g.entropy);
  store_tail<Storage>(grad + label, 1, vfloat(dz == 0 ? 0.0f : dz * transform_slope<kSoftcap>(label_logit, t)[0]));
}

template <class Storage>
void backward_rows(const Rows& logits, const int64_t* labels, int64_t ignore_index, const LogitTransform& t, const float* max_logsum, const float* entropy,
                   const float* d_logprobs, const float* d_entropy, void* grad_logits, int64_t first, int64_t last) {
  using T = typename Storage::type;
  const T* data = static_cast<const T*>(logits.data);
  const bool in_place = grad_logits == logits.data;
  for (int64_t i = first; i < last; ++i) {
    const T* row = data + logits.offset(i);
    T* grad = static_cast<T*>(grad_logits) + (in_place ? logits.offset(i) : i * logits.width);
    const RowGradient g{max_logsum[2 * i], max_logsum[2 * i + 1], d_entropy ? entropy[i] : 0, d_logprobs[i], d_entropy ? d_entropy[i] : 0};
    if (labels[i] == ignore_index || (g.d_logprob == 0 && g.d_entropy == 0)) {
      std::memset(grad, 0, logits.width * sizeof(T));
    } else {
      const auto run = t.softcap > 0 ? backward_row<Storage, true, true> : g.d_entropy != 0 ? backward_row<Storage, true, false> : backward_row<Storage, false, false>;
      run(row, grad, logits.width, labels[i], t, g);
    }
  }
}

int64_t first_bad_label(const int64_t* labels, int64_t count, int64_t width, int64_t ignore_index) {
  for (int64_t i = 0; i < count; ++i)
    if (labels[i] != ignore_index && (labels[i] < 0 || labels[i] >= width)) return i;
  return -1;
}

}  // namespace

int64_t token_logprobs_forward(const Rows& logits, const int64_t* labels, int64_t ignore_index, LogitTransform t, float* logprobs, float* entropy, float* max_logsum,
                               int threads) {
  const int64_t bad = first_bad_label(labels, logits.count(), logits.width, ignore_index);
  if (bad >= 0) return bad;
  parallel_ranges(logits.count(), threads, 1, [&](int64_t first, int64_t last) {
    with_storage(logits.dtype, [&](auto storage) {
      forward_rows<decltype(storage)>(logits, labels, ignore_index, t, logprobs, entropy, max_logsum, first, last);
    });
  });
  return -1;
}

void token_logprobs_add_tile(const float* tile, const int64_t* labels, int64_t count, int64_t width, LogitTransform t, bool entropy, PartialRow* state,
                             int threads) {
  parallel_ranges(count, threads, 1,
                  [&](int64_t first, int64_t last) { add_tile_rows(tile, labels, width, t, entropy, state, first, last); });
}

void token_logprobs_backward(const Rows& logits, const int64_t* labels, int64_t ignore_index, LogitTransform t, const float* max_logsum, const float* entropy,
                             const float* d_logprobs, const float* d_entropy, void* grad_logits, int threads) {
  parallel_ranges(logits.count(), threads, 1, [&](int64_t first, int64_t last) {
    with_storage(logits.dtype, [&](auto storage) {
      backward_rows<decltype(storage)>(logits, labels, ignore_index, t, max_logsum, entropy, d_logprobs, d_entropy, grad_logits, first, last);
    });
  });
}

}  // namespace fastppo::FASTPPO_ISA
