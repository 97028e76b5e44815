// Python bindings of the CPU kernels; `fastppo/native/` is the only caller.
#include <omp.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cstddef>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>

#include "binding_types.h"
#ifdef FASTPPO_HAS_CUDA
#include "cuda/bindings.h"
#endif

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

using Code = std::pair<const char*, int>;

template <std::size_t kCount>
py::dict codes(const std::array<Code, kCount>& named) {
  py::dict made;
  for (const auto& [name, code] : named) made[name] = code;
  return made;
}

constexpr std::array<Code, kNumPPOColumns> kPPOColumnCodes{{
    {"logprobs", kLogprobs}, {"old_logprobs", kOldLogprobs}, {"advantages", kAdvantages}, {"values", kValues}, {"old_values", kOldValues},
    {"returns", kReturns}, {"ref_logprobs", kRefLogprobs}, {"entropy", kEntropy}, {"rollout_logprobs", kRolloutLogprobs}, {"weights", kWeights},
    {"sequence_log_ratios", kSequenceLogRatios},
}};

constexpr std::array<Code, kNumPPOSums> kPPOSumCodes{{
    {"policy_loss", kPolicyLoss}, {"value_loss", kValueLoss}, {"kl_loss", kKLLoss}, {"entropy", kEntropySum}, {"approx_kl", kApproxKL},
    {"ppo_kl", kPPOKL}, {"clipfrac", kClipped}, {"clipfrac_dual", kDualClipped}, {"value_clipfrac", kValueClipped}, {"ratio_mean", kRatio},
    {"ratio_max", kRatioMax}, {"kl_ref", kRefKL}, {"rollout_weight_mean", kRolloutWeight}, {"rollout_clipfrac", kRolloutClipped}, {"tokens", kTokens},
    {"entropy_bonus", kEntropyBonus},
}};

#define FASTPPO_NUMBER(name) Code{#name, offsetof(PPOOptions, name) / sizeof(float)}
constexpr std::array kPPONumberCodes{FASTPPO_NUMBER(ratio_min), FASTPPO_NUMBER(ratio_max), FASTPPO_NUMBER(dual_clip), FASTPPO_NUMBER(value_clip),
                                     FASTPPO_NUMBER(vf_coef), FASTPPO_NUMBER(kl_coef), FASTPPO_NUMBER(entropy_coef), FASTPPO_NUMBER(rollout_min),
                                     FASTPPO_NUMBER(rollout_max)};

// What Python keeps in tables of its own, since it also runs without this module: `native.check_same` compares the two at import.
void export_codes(py::module_& m) {
  m.attr("DTYPE_CODES") = codes(std::array{Code{"float32", kFloat32}, Code{"bfloat16", kBFloat16}, Code{"float16", kFloat16}});
  m.attr("KL_KINDS") = codes(std::array{Code{"k1", kK1}, Code{"k2", kK2}, Code{"k3", kK3}, Code{"abs", kAbs}, Code{"k1+", kK1Plus}, Code{"k3+", kK3Plus}});
  m.attr("ROLLOUT_CORRECTIONS") = codes(std::array{Code{"None", kNoCorrection}, Code{"truncate", kTruncate}, Code{"mask", kMaskOut}});
  m.attr("PPO_COLUMNS") = codes(kPPOColumnCodes);
  m.attr("PPO_SUMS") = codes(kPPOSumCodes);
  m.attr("PPO_NUMBERS") = codes(kPPONumberCodes);
  m.attr("MAX_HEAD_SIZE") = kMaxHeadSize;
}

// New memory that is about to be written: its whole pages as huge ones, where the system gives them to those who ask. Else each 4 KiB is a fault.
void prefer_huge_pages(uintptr_t address, std::size_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t page = sysconf(_SC_PAGESIZE), first = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // where it is refused, the memory is as good as it was
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastppo's compiled kernels; raw pointers in, nothing checked: use fastppo.ops";

  export_codes(m);

  m.def("cpu_isa", [] { return isa() == Isa::kAvx512 ? "avx512" : isa() == Isa::kAvx2 ? "avx2" : "plain"; });

  m.def("prefer_huge_pages", &prefer_huge_pages);

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
                               int64_t max_blocks, int64_t q_stride, int64_t k_page_stride, int64_t v_page_stride, int head_size, int value_size,
                               float scale, float softcap, int64_t window, int threads) {
    py::gil_scoped_release release;
    const DecodeAttention arguments{pointer<const void>(q), pointer<const void>(k_pages), pointer<const void>(v_pages),
                                    pointer<const int32_t>(block_table), pointer<const int32_t>(context_lens), pointer<const float>(sinks),
                                    pointer<void>(out), static_cast<DType>(dtype), batch, heads, kv_heads, pages, page_size, max_blocks, q_stride,
                                    k_page_stride, v_page_stride, head_size, value_size, scale, softcap, window};
    return FASTPPO_CPU(decode_attention, arguments, threads);
  });

  m.def("write_kv", [](uintptr_t k, uintptr_t v, uintptr_t k_pages, uintptr_t v_pages, uintptr_t slots, int64_t tokens, int64_t pages,
                       int64_t page_size, int64_t k_stride_bytes, int64_t v_stride_bytes, int64_t k_row_bytes, int64_t v_row_bytes,
                       int64_t k_page_bytes, int64_t v_page_bytes) {
    py::gil_scoped_release release;
    const WriteKv arguments{pointer<const void>(k), pointer<const void>(v), pointer<void>(k_pages), pointer<void>(v_pages),
                            pointer<const int64_t>(slots), tokens, pages, page_size, k_stride_bytes, v_stride_bytes, k_row_bytes, v_row_bytes,
                            k_page_bytes, v_page_bytes};
    return FASTPPO_CPU(write_kv, arguments);
  });

  // strides: a_row, a_inner, b_inner, b_column, out_row.
  m.def("matmul", [](uintptr_t a, uintptr_t b, uintptr_t bias, uintptr_t out, int dtype, int64_t rows, int64_t columns, int64_t inner,
                     const std::array<int64_t, 5>& strides, bool accumulate, int threads) {
    py::gil_scoped_release release;
    const Matmul arguments{pointer<const void>(a), pointer<const void>(b), pointer<const void>(bias), pointer<void>(out), static_cast<DType>(dtype), rows,
                           columns, inner, strides[0], strides[1], strides[2], strides[3], strides[4], accumulate};
    FASTPPO_CPU(matmul, arguments, threads);
  });

  m.def("rms_norm", [](uintptr_t x, uintptr_t weight, float eps, int64_t rows, int64_t width, uintptr_t update, uintptr_t sum, uintptr_t out, int threads) {
    py::gil_scoped_release release;
    const RmsNorm arguments{pointer<const float>(x), pointer<const float>(weight), eps, rows, width};
    FASTPPO_CPU(rms_norm, arguments, pointer<const float>(update), pointer<float>(sum), pointer<float>(out), threads);
  });

  m.def("rms_norm_backward", [](uintptr_t x, uintptr_t weight, float eps, int64_t rows, int64_t width, uintptr_t d_out, uintptr_t d_sum, uintptr_t d_x,
                                uintptr_t d_weight, int threads) {
    py::gil_scoped_release release;
    const RmsNorm arguments{pointer<const float>(x), pointer<const float>(weight), eps, rows, width};
    FASTPPO_CPU(rms_norm_backward, arguments, pointer<const float>(d_out), pointer<const float>(d_sum), pointer<float>(d_x), pointer<float>(d_weight), threads);
  });

  // sizes: rows, heads, head_size, rotary_size, x_stride.
  m.def("rotary_embedding", [](uintptr_t x, uintptr_t cos, uintptr_t sin, uintptr_t positions, const std::array<int64_t, 5>& n, bool backward, uintptr_t out,
                               int threads) {
    py::gil_scoped_release release;
    const RotaryEmbedding arguments{pointer<const float>(x), pointer<const float>(cos), pointer<const float>(sin), pointer<const int64_t>(positions),
                                    n[0], n[1], n[2], n[3], n[4]};
    FASTPPO_CPU(rotary_embedding, arguments, backward, pointer<float>(out), threads);
  });

  m.def("swiglu", [](uintptr_t gate, uintptr_t up, int64_t count, uintptr_t out, int threads) {
    py::gil_scoped_release release;
    FASTPPO_CPU(swiglu, pointer<const float>(gate), pointer<const float>(up), count, pointer<float>(out), threads);
  });

  m.def("swiglu_backward", [](uintptr_t gate, uintptr_t up, uintptr_t d_out, int64_t count, uintptr_t d_gate, uintptr_t d_up, uintptr_t out, int threads) {
    py::gil_scoped_release release;
    FASTPPO_CPU(swiglu_backward, pointer<const float>(gate), pointer<const float>(up), pointer<const float>(d_out), count, pointer<float>(d_gate),
                pointer<float>(d_up), pointer<float>(out), threads);
  });

  m.def("packed_attention", [](const PackedAttentionTuple& tuple, int threads) {
    py::gil_scoped_release release;
    FASTPPO_CPU(packed_attention, packed_attention_of(tuple), threads);
  });

  // gradients: d_out, d_q, d_k, d_v. groups: address, count.
  m.def("packed_attention_backward", [](const PackedAttentionTuple& tuple, const std::array<uintptr_t, 4>& gradients,
                                        const std::pair<uintptr_t, int64_t>& groups, int threads) {
    py::gil_scoped_release release;
    const PackedAttentionGradients to{pointer<const float>(gradients[0]), pointer<float>(gradients[1]), pointer<float>(gradients[2]),
                                      pointer<float>(gradients[3])};
    FASTPPO_CPU(packed_attention_backward, packed_attention_of(tuple), to, pointer<const int64_t>(groups.first), groups.second, threads);
  });

  py::class_<DecoderLayers>(m, "DecoderLayers").def(py::init([](const std::vector<DecoderLayerTuple>& tuples) {
    DecoderLayers made;
    for (const DecoderLayerTuple& tuple : tuples) made.layers.push_back(decoder_layer(tuple));
    return made;
  }));

  // addresses: tokens, lengths, block_table, embedding, cos, sin, hidden, context_lens, scratch. sizes: those of Decoder, in its order.
  m.def("decoder_step", [](const std::array<uintptr_t, 9>& addresses, const NormWeightsTuple& norm, const std::array<int64_t, 12>& sizes,
                           const DecoderLayers& layers, int threads) {
    py::gil_scoped_release release;
    const auto& a = addresses;
    const auto& n = sizes;
    const Decoder step{pointer<const int64_t>(a[0]), pointer<const int64_t>(a[1]), pointer<const int32_t>(a[2]), pointer<const float>(a[3]),
                       pointer<const float>(a[4]), pointer<const float>(a[5]), norm_weights(norm), pointer<float>(a[6]), pointer<int32_t>(a[7]),
                       n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11]};
    return FASTPPO_CPU(decoder_step, step, layers.layers.data(), static_cast<int64_t>(layers.layers.size()), pointer<float>(a[8]), threads);
  });

  m.def("ppo_loss_parts", &ppo_loss_parts);

  m.def("ppo_loss_sequences", [](const PPOTokensTuple& tokens, const SequencesTuple& shape, uintptr_t weights, uintptr_t log_ratios,
                                 uintptr_t used_sequences, int threads) {
    py::gil_scoped_release release;
    FASTPPO_CPU(ppo_loss_sequences, ppo_tokens(tokens), sequences(shape), pointer<float>(weights), pointer<float>(log_ratios),
                pointer<double>(used_sequences), threads);
  });

  m.def("ppo_loss_tokens", [](const PPOTokensTuple& tokens, const PPOOptionsTuple& options, uintptr_t part_sums,
                              const std::array<uintptr_t, 3>& gradients, int threads) {
    py::gil_scoped_release release;
    FASTPPO_CPU(ppo_loss_tokens, ppo_tokens(tokens), ppo_options(options), pointer<float>(part_sums), ppo_gradients(gradients), threads);
  });

  m.def("ppo_loss_finish", [](uintptr_t part_sums, int64_t parts, const PPOOptionsTuple& options, uintptr_t denominator,
                              const std::array<uintptr_t, 3>& result) {
    FASTPPO_CPU(ppo_loss_finish, pointer<const float>(part_sums), parts, ppo_options(options), pointer<const double>(denominator), ppo_result(result));
  });

  m.def("first_bad_offset", [](uintptr_t offsets, int64_t count, int64_t tokens) {
    return FASTPPO_CPU(first_bad_offset, pointer<const int64_t>(offsets), count, tokens);
  });

  m.def("gae", [](const StepsTuple& rewards, const StepsTuple& values, const StepsTuple& next_values, const StepsTuple& mask, const StepsTuple& dones,
                  const StepsTuple& truncated, uintptr_t bootstrap, uintptr_t decays, float gamma, float decay, const SequencesTuple& shape,
                  uintptr_t advantages, uintptr_t returns, int threads) {
    py::gil_scoped_release release;
    const GaeInputs inputs{steps(rewards), steps(values), steps(next_values), steps(mask), steps(dones), steps(truncated),
                           pointer<const float>(bootstrap), pointer<const float>(decays), gamma, decay};
    FASTPPO_CPU(gae, inputs, sequences(shape), pointer<float>(advantages), pointer<float>(returns), threads);
  });

  m.def("first_unbootstrapped_truncation",
        [](const StepsTuple& mask, const StepsTuple& dones, const StepsTuple& truncated, const SequencesTuple& shape) {
          py::gil_scoped_release release;
          return FASTPPO_CPU(first_unbootstrapped_truncation, steps(mask), steps(dones), steps(truncated), sequences(shape));
        });

  m.def("masked_moments", [](uintptr_t x, uintptr_t mask, int64_t count, int threads) {
    py::gil_scoped_release release;
    const Moments moments = FASTPPO_CPU(masked_moments, pointer<const float>(x), pointer<const uint8_t>(mask), count, threads);
    return std::make_tuple(moments.count, moments.mean, moments.squares);
  });

  m.def("masked_whiten", [](uintptr_t x, uintptr_t mask, int64_t count, const std::tuple<double, double, double>& moments, bool keep_mean,
                            uintptr_t out, int threads) {
    py::gil_scoped_release release;
    FASTPPO_CPU(masked_whiten, pointer<const float>(x), pointer<const uint8_t>(mask), count,
                (Moments{std::get<0>(moments), std::get<1>(moments), std::get<2>(moments)}), keep_mean, pointer<float>(out), threads);
  });

  m.def("approx_kl", [](uintptr_t logprobs, uintptr_t ref_logprobs, int64_t count, int kind, uintptr_t kl, int threads) {
    py::gil_scoped_release release;
    FASTPPO_CPU(approx_kl, pointer<const float>(logprobs), pointer<const float>(ref_logprobs), count, static_cast<KLKind>(kind),
                pointer<float>(kl), threads);
  });

  m.def("approx_kl_backward",
        [](uintptr_t logprobs, uintptr_t ref_logprobs, uintptr_t d_kl, int64_t count, int kind, uintptr_t grad, int threads) {
          py::gil_scoped_release release;
          FASTPPO_CPU(approx_kl_backward, pointer<const float>(logprobs), pointer<const float>(ref_logprobs), pointer<const float>(d_kl), count,
                      static_cast<KLKind>(kind), pointer<float>(grad), threads);
        });

  m.def("kl_shaped_rewards", [](uintptr_t scores, uintptr_t logprobs, uintptr_t ref_logprobs, uintptr_t mask, const SequencesTuple& shape, float coef,
                                int kind, uintptr_t rewards, int threads) {
    py::gil_scoped_release release;
    FASTPPO_CPU(kl_shaped_rewards, pointer<const float>(scores), pointer<const float>(logprobs), pointer<const float>(ref_logprobs),
                pointer<const uint8_t>(mask), sequences(shape), coef, static_cast<KLKind>(kind), pointer<float>(rewards), threads);
  });

#ifdef FASTPPO_HAS_CUDA
  bind_cuda(m);
#endif
}
