// What fastppo/native/ passes, as the launchers take it: integers become pointers here and nowhere else in C++.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "ops.h"

namespace fastppo {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (address, dtype, outer, inner, width, stride_outer, stride_inner), as `native.rows` makes it.
using RowsTuple = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t, int64_t, int64_t>;

inline Rows rows(const RowsTuple& t) {
  return {pointer<const void>(std::get<0>(t)), static_cast<DType>(std::get<1>(t)), std::get<2>(t), std::get<3>(t), std::get<4>(t), std::get<5>(t),
          std::get<6>(t)};
}

using TransformTuple = std::tuple<float, float, float>;

inline LogitTransform transform(const TransformTuple& t) { return {std::get<0>(t), std::get<1>(t), std::get<2>(t)}; }

// (address, dtype) of contiguous numbers, as `native.column` makes it.
using ColumnTuple = std::pair<uintptr_t, int>;

inline Column column(const ColumnTuple& t) { return {pointer<const void>(t.first), static_cast<DType>(t.second)}; }

// (weight, bias, columns, stride) and (weight, eps).
using LinearWeightsTuple = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t>;
using NormWeightsTuple = std::pair<uintptr_t, float>;

inline LinearWeights linear_weights(const LinearWeightsTuple& t) {
  const auto& [weight, bias, columns, stride] = t;
  return {pointer<const float>(weight), pointer<const float>(bias), columns, stride};
}

inline NormWeights norm_weights(const NormWeightsTuple& t) { return {pointer<const float>(t.first), t.second}; }

// Addresses q, k, v, sequences, out, lse; sizes count, heads, kv_heads, head_size, q_stride, k_stride, v_stride; scale; window.
using PackedAttentionTuple = std::tuple<std::array<uintptr_t, 6>, std::array<int64_t, 7>, float, int64_t>;

inline PackedAttention packed_attention_of(const PackedAttentionTuple& t) {
  const auto& [a, n, scale, window] = t;
  return {pointer<const float>(a[0]), pointer<const float>(a[1]), pointer<const float>(a[2]), pointer<const int64_t>(a[3]), pointer<float>(a[4]),
          pointer<float>(a[5]), n[0], n[1], n[2], n[3], n[4], n[5], n[6], scale, window};
}

// Norms, linear layers, (k_pages, v_pages), scale and window of a DecoderLayer, in its order.
using DecoderLayerTuple = std::tuple<std::array<NormWeightsTuple, 4>, std::array<LinearWeightsTuple, 7>, std::array<uintptr_t, 2>, float, int64_t>;

inline DecoderLayer decoder_layer(const DecoderLayerTuple& t) {
  const auto& [norms, linears, pages, scale, window] = t;
  return {norm_weights(norms[0]), norm_weights(norms[1]), norm_weights(norms[2]), norm_weights(norms[3]),
          linear_weights(linears[0]), linear_weights(linears[1]), linear_weights(linears[2]), linear_weights(linears[3]),
          linear_weights(linears[4]), linear_weights(linears[5]), linear_weights(linears[6]),
          pointer<float>(pages[0]), pointer<float>(pages[1]), scale, window};
}

// What Python holds of a model from step to step.
struct DecoderLayers {
  std::vector<DecoderLayer> layers;
};

// (address, dtype) of each column, the mask's address, the number of tokens, as `native.ppo_tokens` makes it.
using PPOTokensTuple = std::tuple<std::array<ColumnTuple, kNumPPOColumns>, uintptr_t, int64_t>;

inline PPOTokens ppo_tokens(const PPOTokensTuple& t) {
  PPOTokens tokens{{}, pointer<const uint8_t>(std::get<1>(t)), std::get<2>(t)};
  for (int c = 0; c < kNumPPOColumns; ++c) tokens.columns[c] = column(std::get<0>(t)[c]);
  return tokens;
}

// The numbers and the choices of PPOOptions, in its order.
using PPOOptionsTuple = std::pair<std::array<float, 9>, std::array<int, 3>>;

inline PPOOptions ppo_options(const PPOOptionsTuple& t) {
  const auto& [x, choice] = t;
  return {x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8],
          static_cast<KLKind>(choice[0]), static_cast<RolloutCorrection>(choice[1]), choice[2] != 0};
}

// Addresses of the gradients of logprobs, values and entropy.
inline PPOGradients ppo_gradients(const std::array<uintptr_t, 3>& t) { return {pointer<float>(t[0]), pointer<float>(t[1]), pointer<float>(t[2])}; }

// Addresses of the loss, its statistics and the scale of its gradients.
inline PPOResult ppo_result(const std::array<uintptr_t, 3>& t) { return {pointer<float>(t[0]), pointer<float>(t[1]), pointer<double>(t[2])}; }

// (address, dtype, stride_sequence, stride_step), as `native.steps` makes it.
using StepsTuple = std::tuple<uintptr_t, int, int64_t, int64_t>;

inline Steps steps(const StepsTuple& t) { return {pointer<const void>(std::get<0>(t)), static_cast<DType>(std::get<1>(t)), std::get<2>(t), std::get<3>(t)}; }

// (address of offsets or 0, count, length), as `native.sequences` makes it.
using SequencesTuple = std::tuple<uintptr_t, int64_t, int64_t>;

inline Sequences sequences(const SequencesTuple& t) { return {pointer<const int64_t>(std::get<0>(t)), std::get<1>(t), std::get<2>(t)}; }

}  // namespace fastppo
