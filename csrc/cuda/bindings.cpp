// Python bindings of the CUDA kernels: all enqueue on the stream and return at once; a CUDA error is a RuntimeError.
#include "bindings.h"

#include <stdexcept>
#include <string>

#include "../binding_types.h"
#include "launchers.h"

namespace py = pybind11;

namespace fastppo {
namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Makes a device the thread's current one for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_));
    changed_ = previous_ != device;
    if (changed_) check(cudaSetDevice(device));
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// (device, stream handle), as `native.stream` makes it.
using StreamTuple = std::tuple<int, uintptr_t>;

// Calls body(stream) with the stream's device current and without the GIL.
template <class Body>
void enqueue(const StreamTuple& stream, const Body& body) {
  const py::gil_scoped_release release;
  const DeviceGuard guard(std::get<0>(stream));
  check(body(reinterpret_cast<cudaStream_t>(std::get<1>(stream))));
}

void bind_sequences(py::module_& m) {
  m.def("check_offsets", [](uintptr_t offsets, bool are_int64, int64_t count, int64_t tokens, uintptr_t out, const StreamTuple& on) {
    enqueue(on, [&](cudaStream_t stream) {
      return cuda::check_offsets(pointer<const void>(offsets), are_int64, count, tokens, pointer<int64_t>(out), stream);
    });
  });
}

void bind_gae(py::module_& m) {
  m.def("gae", [](const StepsTuple& rewards, const StepsTuple& values, const StepsTuple& next_values, const StepsTuple& mask, const StepsTuple& dones,
                  const StepsTuple& truncated, uintptr_t bootstrap, uintptr_t decays, float gamma, float decay, const SequencesTuple& shape,
                  uintptr_t advantages, uintptr_t returns, const StreamTuple& on) {
    const GaeInputs inputs{steps(rewards), steps(values), steps(next_values), steps(mask), steps(dones), steps(truncated),
                           pointer<const float>(bootstrap), pointer<const float>(decays), gamma, decay};
    enqueue(on, [&](cudaStream_t stream) { return cuda::gae(inputs, sequences(shape), pointer<float>(advantages), pointer<float>(returns), stream); });
  });
}

void bind_masked_whiten(py::module_& m) {
  m.attr("MAX_PARTIAL_MOMENTS") = cuda::kMaxPartialMoments;

  m.def("masked_moments", [](const ColumnTuple& x, uintptr_t mask, int64_t count, uintptr_t partial, const std::array<uintptr_t, 3>& moments,
                             const StreamTuple& on) {
    enqueue(on, [&](cudaStream_t stream) {
      return cuda::masked_moments(column(x), pointer<const uint8_t>(mask), count, pointer<Moments>(partial), pointer<double>(moments[0]),
                                  pointer<double>(moments[1]), pointer<double>(moments[2]), stream);
    });
  });

  m.def("masked_whiten", [](const ColumnTuple& x, uintptr_t mask, int64_t count, const std::array<uintptr_t, 3>& moments, bool keep_mean, uintptr_t out,
                            const StreamTuple& on) {
    enqueue(on, [&](cudaStream_t stream) {
      return cuda::masked_whiten(column(x), pointer<const uint8_t>(mask), count, pointer<const double>(moments[0]), pointer<const double>(moments[1]),
                                 pointer<const double>(moments[2]), keep_mean, pointer<float>(out), stream);
    });
  });
}

void bind_sample_tokens(py::module_& m) {
  m.def("sample_tokens_scratch", &cuda::sample_tokens_scratch);

  m.def("sample_tokens", [](const RowsTuple& logits, uintptr_t temperature, uintptr_t top_k, uintptr_t top_p, uintptr_t min_p, uintptr_t sequence_ids,
                            uintptr_t positions, uint64_t seed, uintptr_t tokens, uintptr_t logprobs, uintptr_t processed_logprobs, uintptr_t kept_mass,
                            uintptr_t scratch, const StreamTuple& on) {
    const SamplingParameters parameters{pointer<const float>(temperature), pointer<const int64_t>(top_k), pointer<const float>(top_p),
                                        pointer<const float>(min_p), pointer<const int64_t>(sequence_ids), pointer<const int64_t>(positions), seed};
    const SampledRows out{pointer<int64_t>(tokens), pointer<float>(logprobs), pointer<float>(processed_logprobs), pointer<float>(kept_mass)};
    enqueue(on, [&](cudaStream_t stream) { return cuda::sample_tokens(rows(logits), parameters, out, pointer<void>(scratch), stream); });
  });
}

void bind_ppo_loss(py::module_& m) {
  m.def("ppo_loss_parts", &cuda::ppo_loss_parts);
  m.def("ppo_sequence_parts", &cuda::ppo_sequence_parts);

  m.def("ppo_loss_sequences", [](const PPOTokensTuple& tokens, const SequencesTuple& shape, uintptr_t partial, uintptr_t weights, uintptr_t log_ratios,
                                 uintptr_t used_sequences, const StreamTuple& on) {
    enqueue(on, [&](cudaStream_t stream) {
      return cuda::ppo_loss_sequences(ppo_tokens(tokens), sequences(shape), pointer<double>(partial), pointer<float>(weights), pointer<float>(log_ratios),
                                      pointer<double>(used_sequences), stream);
    });
  });

  m.def("ppo_loss_tokens", [](const PPOTokensTuple& tokens, const PPOOptionsTuple& options, uintptr_t part_sums,
                              const std::array<uintptr_t, 3>& gradients, const StreamTuple& on) {
    enqueue(on, [&](cudaStream_t stream) {
      return cuda::ppo_loss_tokens(ppo_tokens(tokens), ppo_options(options), pointer<float>(part_sums), ppo_gradients(gradients), stream);
    });
  });

  m.def("ppo_loss_finish", [](uintptr_t part_sums, int64_t parts, const PPOOptionsTuple& options, uintptr_t denominator,
                              const std::array<uintptr_t, 3>& result, const StreamTuple& on) {
    enqueue(on, [&](cudaStream_t stream) {
      return cuda::ppo_loss_finish(pointer<const float>(part_sums), parts, ppo_options(options), pointer<const double>(denominator), ppo_result(result),
                                   stream);
    });
  });

  // Of each gradient: it, the scaled one's address and dtype, count.
  using GradientTuple = std::tuple<ColumnTuple, uintptr_t, int, int64_t>;
  m.def("scale_gradients", [](const std::array<GradientTuple, cuda::kMaxScaledGradients>& gradients, uintptr_t d_loss, uintptr_t scale,
                              const StreamTuple& on) {
    cuda::ScaledGradients scaled{};
    for (int i = 0; i < cuda::kMaxScaledGradients; ++i) {
      const auto& [from, to, dtype, count] = gradients[i];
      scaled.each[i] = {column(from), pointer<void>(to), static_cast<DType>(dtype), count};
    }
    enqueue(on, [&](cudaStream_t stream) { return cuda::scale_gradients(scaled, pointer<const float>(d_loss), pointer<const double>(scale), stream); });
  });
}

void bind_approx_kl(py::module_& m) {
  m.def("approx_kl", [](const ColumnTuple& logprobs, const ColumnTuple& ref_logprobs, int64_t count, int kind, uintptr_t kl, const StreamTuple& on) {
    enqueue(on, [&](cudaStream_t stream) {
      return cuda::approx_kl(column(logprobs), column(ref_logprobs), count, static_cast<KLKind>(kind), pointer<float>(kl), stream);
    });
  });

  m.def("approx_kl_backward", [](const ColumnTuple& logprobs, const ColumnTuple& ref_logprobs, uintptr_t d_kl, int64_t count, int kind, uintptr_t grad,
                                 const StreamTuple& on) {
    enqueue(on, [&](cudaStream_t stream) {
      return cuda::approx_kl_backward(column(logprobs), column(ref_logprobs), pointer<const float>(d_kl), count, static_cast<KLKind>(kind),
                                      pointer<float>(grad), stream);
    });
  });

  m.def("kl_shaped_rewards", [](const ColumnTuple& scores, const ColumnTuple& logprobs, const ColumnTuple& ref_logprobs, uintptr_t mask,
                                const SequencesTuple& shape, int64_t tokens, float coef, int kind, uintptr_t rewards, const StreamTuple& on) {
    enqueue(on, [&](cudaStream_t stream) {
      return cuda::kl_shaped_rewards(column(scores), column(logprobs), column(ref_logprobs), pointer<const uint8_t>(mask), sequences(shape), tokens, coef,
                                     static_cast<KLKind>(kind), pointer<float>(rewards), stream);
    });
  });
}

}  // namespace

void bind_cuda(py::module_& m) {
  py::module_ cuda = m.def_submodule("cuda", "the CUDA kernels; raw device pointers in, nothing checked");
  bind_sequences(cuda);
  bind_gae(cuda);
  bind_masked_whiten(cuda);
  bind_sample_tokens(cuda);
  bind_ppo_loss(cuda);
  bind_approx_kl(cuda);
}

}  // namespace fastppo
