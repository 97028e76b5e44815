// Python bindings: integers become pointers here and nowhere else in C++; `fastppo/native.py` is the only caller.
#include <omp.h>
#include <pybind11/pybind11.h>

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

// (address, dtype, stride_sequence, stride_step), as `native.steps` makes it.
using StepsTuple = std::tuple<uintptr_t, int, int64_t, int64_t>;

Steps steps(const StepsTuple& t) { return {pointer<const void>(std::get<0>(t)), static_cast<DType>(std::get<1>(t)), std::get<2>(t), std::get<3>(t)}; }

// (address of offsets or 0, count, length), as `native.sequences` makes it.
using SequencesTuple = std::tuple<uintptr_t, int64_t, int64_t>;

Sequences sequences(const SequencesTuple& t) { return {pointer<const int64_t>(std::get<0>(t)), std::get<1>(t), std::get<2>(t)}; }

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

  m.def("token_logprobs_backward", [](const RowsTuple& logits, uintptr_t labels, int64_t ignore_index, const TransformTuple& t, uintptr_t max_logsum,
                                      uintptr_t entropy, uintptr_t d_logprobs, uintptr_t d_entropy, uintptr_t grad_logits, int threads) {
    py::gil_scoped_release release;
    FASTPPO_CPU(token_logprobs_backward, rows(logits), pointer<const int64_t>(labels), ignore_index, transform(t), pointer<const float>(max_logsum),
                pointer<const float>(entropy), pointer<const float>(d_logprobs), pointer<const float>(d_entropy), pointer<void>(grad_logits), threads);
  });

  m.def("first_bad_offset", [](uintptr_t offsets, int64_t count, int64_t tokens) {
    return FASTPPO_CPU(first_bad_offset, pointer<const int64_t>(offsets), count, tokens);
  });

  m.def("gae", [](const StepsTuple& rewards, const StepsTuple& values, const StepsTuple& next_values, const StepsTuple& mask, const StepsTuple& dones,
                  const StepsTuple& truncated, uintptr_t bootstrap, uintptr_t decays, float gamma, float decay, const SequencesTuple& shape,
                  uintptr_t advantages, uintptr_t returns, int threads) {
    py::gil_scoped_release release;
    const GaeInputs inputs{steps(rewards),   steps(values), steps(next_values), steps(mask), steps(dones), steps(truncated), pointer<const float>(bootstrap),
                           pointer<const float>(decays), gamma, decay};
    FASTPPO_CPU(gae, inputs, sequences(shape), pointer<float>(advantages), pointer<float>(returns), threads);
  });

  m.def("first_unbootstrapped_truncation", [](const StepsTuple& mask, const StepsTuple& dones, const StepsTuple& truncated, const SequencesTuple& shape) {
    py::gil_scoped_release release;
    return FASTPPO_CPU(first_unbootstrapped_truncation, steps(mask), steps(dones), steps(truncated), sequences(shape));
  });

  m.def("masked_moments", [](uintptr_t x, uintptr_t mask, int64_t count, int threads) {
    py::gil_scoped_release release;
    const Moments moments = FASTPPO_CPU(masked_moments, pointer<const float>(x), pointer<const uint8_t>(mask), count, threads);
    return std::make_tuple(moments.count, moments.mean, moments.squares);
  });

  m.def("masked_whiten", [](uintptr_t x, uintptr_t mask, int64_t count, const std::tuple<double, double, double>& moments, bool keep_mean, uintptr_t out,
                            int threads) {
    py::gil_scoped_release release;
    FASTPPO_CPU(masked_whiten, pointer<const float>(x), pointer<const uint8_t>(mask), count,
                (Moments{std::get<0>(moments), std::get<1>(moments), std::get<2>(moments)}), keep_mean, pointer<float>(out), threads);
  });

  m.def("approx_kl", [](uintptr_t logprobs, uintptr_t ref_logprobs, int64_t count, int kind, uintptr_t kl, int threads) {
    py::gil_scoped_release release;
    FASTPPO_CPU(approx_kl, pointer<const float>(logprobs), pointer<const float>(ref_logprobs), count, static_cast<KlKind>(kind), pointer<float>(kl), threads);
  });

  m.def("approx_kl_backward",
        [](uintptr_t logprobs, uintptr_t ref_logprobs, uintptr_t d_kl, int64_t count, int kind, uintptr_t grad, int threads) {
          py::gil_scoped_release release;
          FASTPPO_CPU(approx_kl_backward, pointer<const float>(logprobs), pointer<const float>(ref_logprobs), pointer<const float>(d_kl), count,
                      static_cast<KlKind>(kind), pointer<float>(grad), threads);
        });

  m.def("kl_shaped_rewards", [](uintptr_t scores, uintptr_t logprobs, uintptr_t ref_logprobs, uintptr_t mask, const SequencesTuple& shape, float coef,
                                int kind, uintptr_t rewards, int threads) {
    py::gil_scoped_release release;
    FASTPPO_CPU(kl_shaped_rewards, pointer<const float>(scores), pointer<const float>(logprobs), pointer<const float>(ref_logprobs),
                pointer<const uint8_t>(mask), sequences(shape), coef, static_cast<KlKind>(kind), pointer<float>(rewards), threads);
  });
}
