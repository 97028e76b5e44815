// Python bindings: integers become pointers here and nowhere else in C++; `fastppo/native.py` is the only caller.
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "ops.h"

namespace py = pybind11;
using namespace fastppo;

namespace {

enum class Isa { kPlain, kAvx2, kAvx512 };

Isa detect_isa() {
#if defined(__x86_64__)
  const char* forced = std::getenv("FASTPPO_ISA");
  const std::string want = forced ? forced : "";
  if (!want.empty() && want != "plain" && want != "avx2" && want != "avx512")
    throw std::runtime_error("FASTPPO_ISA is '" + want + "', expected plain, avx2 or avx512");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && (want.empty() || want == "avx512")) return Isa::kAvx512;
  if (avx2 && want != "plain") return Isa::kAvx2;
#endif
  return Isa::kPlain;
}

Isa isa() {
  static const Isa chosen = detect_isa();
  return chosen;
}

#if defined(__x86_64__)
#define FASTPPO_CPU(name, ...)                                                \
  (isa() == Isa::kAvx512 ? avx512::name(__VA_ARGS__) : isa() == Isa::kAvx2 ? avx2::name(__VA_ARGS__) : plain::name(__VA_ARGS__))
#else
#define FASTPPO_CPU(name, ...) plain::name(__VA_ARGS__)
#endif

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (address, dtype, outer, inner, width, stride_outer, stride_inner), as `native.rows` makes it.
using RowsTuple = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t, int64_t, int64_t>;

Rows rows(const RowsTuple& t) {
  return {pointer<const void>(std::get<0>(t)), static_cast<DType>(std::get<1>(t)), std::get<2>(t), std::get<3>(t), std::get<4>(t), std::get<5>(t),
          std::get<6>(t)};
}

using TransformTuple = std::tuple<float, float, float>;

LogitTransform transform(const TransformTuple& t) { return {std::get<0>(t), std::get<1>(t), std::get<2>(t)}; }

// (address, dtype) of each column, the mask's address, the number of tokens, as `native.ppo_tokens` makes it.
using PPOTokensTuple = std::tuple<std::array<std::pair<uintptr_t, int>, kNumPPOColumns>, uintptr_t, int64_t>;

PPOTokens ppo_tokens(const PPOTokensTuple& t) {
  PPOTokens tokens{{}, pointer<const uint8_t>(std::get<1>(t)), std::get<2>(t)};
  for (int c = 0; c < kNumPPOColumns; ++c) tokens.columns[c] = {pointer<const void>(std::get<0>(t)[c].first), static_cast<DType>(std::get<0>(t)[c].second)};
  return tokens;
}

// The numbers and the choices of PPOOptions, in its order.
PPOOptions ppo_options(const std::array<float, 10>& x, const std::array<int, 4>& choice) {
  return {x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9],
          static_cast<KLKind>(choice[0]), static_cast<KLKind>(choice[1]), static_cast<RolloutCorrection>(choice[2]), choice[3] != 0};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastppo's compiled kernels; raw pointers in, nothing checked: use fastppo.ops";

  m.def("cpu_isa", [] { return isa() == Isa::kAvx512 ? "avx512" : isa() == Isa::kAvx2 ? "avx2" : "plain"; });

  m.def("token_logprobs_forward", [](const RowsTuple& logits, uintptr_t labels, int64_t ignore_index, const TransformTuple& t, uintptr_t logprobs,
                                     uintptr_t entropy, uintptr_t max_logsum, int threads) {
    py::gil_scoped_release release;
    return FASTPPO_CPU(token_logprobs_forward, rows(logits), pointer<const int64_t>(labels), ignore_index, transform(t), pointer<float>(logprobs),
                       pointer<float>(entropy), pointer<float>(max_logsum), threads);
  });

  m.def("token_logprobs_add_tile", [](uintptr_t tile, uintptr_t labels, int64_t count, int64_t width, const TransformTuple& t, bool entropy, uintptr_t state,
                                      int threads) {
    py::gil_scoped_release release;
    FASTPPO_CPU(token_logprobs_add_tile, pointer<const float>(tile), pointer<const int64_t>(labels), count, width, transform(t), entropy,
                pointer<PartialRow>(state), threads);
  });

  m.def("token_logprobs_backward", [](const RowsTuple& logits, uintptr_t labels, int64_t ignore_index, const TransformTuple& t, uintptr_t max_logsum,
                                      uintptr_t entropy, uintptr_t d_logprobs, uintptr_t d_entropy, uintptr_t grad_logits, int threads) {
    py::gil_scoped_release release;
    FASTPPO_CPU(token_logprobs_backward, rows(logits), pointer<const int64_t>(labels), ignore_index, transform(t), pointer<const float>(max_logsum),
                pointer<const float>(entropy), pointer<const float>(d_logprobs), pointer<const float>(d_entropy), pointer<void>(grad_logits), threads);
  });

  m.def("sample_tokens", [](const RowsTuple& logits, uintptr_t temperature, uintptr_t top_k, uintptr_t top_p, uintptr_t min_p, uintptr_t sequence_ids,
                            uintptr_t positions, uint64_t seed, uintptr_t tokens, uintptr_t logprobs, uintptr_t processed_logprobs, uintptr_t kept_mass,
                            int threads) {
    py::gil_scoped_release release;
    const SamplingParameters parameters{pointer<const float>(temperature), pointer<const int64_t>(top_k),        pointer<const float>(top_p),
                                        pointer<const float>(min_p),       pointer<const int64_t>(sequence_ids), pointer<const int64_t>(positions),
                                        seed};
    const SampledRows out{pointer<int64_t>(tokens), pointer<float>(logprobs), pointer<float>(processed_logprobs), pointer<float>(kept_mass)};
    FASTPPO_CPU(sample_tokens, rows(logits), parameters, out, threads);
  });

  m.def("decode_attention", [](uintptr_t q, uintptr_t k_pages, uintptr_t v_pages, uintptr_t block_table, uintptr_t context_lens, uintptr_t sinks,
                               uintptr_t out, int dtype, int64_t batch, int64_t heads, int64_t kv_heads, int64_t pages, int64_t page_size,
                               int64_t max_blocks, int64_t q_stride, int head_size, int value_size, float scale, float softcap, int64_t window,
                               int threads) {
    py::gil_scoped_release release;
    const DecodeAttention arguments{pointer<const void>(q), pointer<const void>(k_pages), pointer<const void>(v_pages),
                                    pointer<const int32_t>(block_table), pointer<const int32_t>(context_lens), pointer<const float>(sinks),
                                    pointer<void>(out), static_cast<DType>(dtype), batch, heads, kv_heads, pages, page_size, max_blocks, q_stride,
                                    head_size, value_size, scale, softcap, window};
    return FASTPPO_CPU(decode_attention, arguments, threads);
  });

  m.def("write_kv", [](uintptr_t k, uintptr_t v, uintptr_t k_pages, uintptr_t v_pages, uintptr_t slots, int64_t tokens, int64_t pages,
                       int64_t page_size, int64_t k_stride_bytes, int64_t v_stride_bytes, int64_t k_row_bytes, int64_t v_row_bytes) {
    py::gil_scoped_release release;
    const WriteKv arguments{pointer<const void>(k), pointer<const void>(v), pointer<void>(k_pages), pointer<void>(v_pages),
                            pointer<const int64_t>(slots), tokens, pages, page_size, k_stride_bytes, v_stride_bytes, k_row_bytes, v_row_bytes};
    return FASTPPO_CPU(write_kv, arguments);
  });

  m.def("ppo_loss_sequences", [](const PPOTokensTuple& tokens, uintptr_t offsets, int64_t count, int64_t length, uintptr_t weights, uintptr_t log_ratios, int threads) {
    py::gil_scoped_release release;
    const PPOCounts counts = FASTPPO_CPU(ppo_loss_sequences, ppo_tokens(tokens), Sequences{pointer<const int64_t>(offsets), count, length},
                                         pointer<float>(weights), pointer<float>(log_ratios), threads);
    return std::make_tuple(counts.tokens, counts.sequences, counts.bad_offset);
  });

  m.def("ppo_loss_tokens", [](const PPOTokensTuple& tokens, const std::array<float, 10>& numbers, const std::array<int, 4>& choices, uintptr_t d_logprobs,
                              uintptr_t d_values, uintptr_t d_entropy, int threads) {
    py::gil_scoped_release release;
    std::array<double, kNumPPOSums> sums;
    FASTPPO_CPU(ppo_loss_tokens, ppo_tokens(tokens), ppo_options(numbers, choices), sums.data(),
                PPOGradients{pointer<float>(d_logprobs), pointer<float>(d_values), pointer<float>(d_entropy)}, threads);
    return sums;
  });
}
