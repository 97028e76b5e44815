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

}  // namespace

void bind_cuda(py::module_& m) {
  py::module_ cuda = m.def_submodule("cuda", "the CUDA kernels; raw device pointers in, nothing checked");
  bind_sequences(cuda);
  bind_gae(cuda);
  bind_masked_whiten(cuda);
  bind_sample_tokens(cuda);
}

}  // namespace fastppo
