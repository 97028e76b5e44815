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
}
