// x W^T + b for few rows of x, as decoding has them: weights are read once, where they lie, and each output is one sum in a fixed order, so that it does
// not depend on the other rows. (A general matrix product first copies the weights into its own order, which costs more than the product itself here.)
#include <algorithm>

#include "parallel.h"

namespace fastppo::FASTPPO_ISA {
namespace {

// Outputs that are summed side by side: four columns, whose last additions are shared, and as many rows as there are registers for accumulators.
constexpr int kColumnsAtOnce = 4;
#if defined(__AVX512F__)
constexpr int kRowsAtOnce = 4;
#else
constexpr int kRowsAtOnce = 1;
#endif
constexpr int64_t kProductsWorthAThread = 1 << 15;

// out[row, column] of kRows rows of x and kColumns of W's.
template <class Storage, int kRows, int kColumns>
void multiply_block(const Linear& a, int64_t row, int64_t column) {
  using T = typename Storage::type;
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  const T* w = static_cast<const T*>(a.weight) + column * a.weight_stride;
  vfloat sums[kRows][kColumns];
  for (auto& line : sums)
    for (vfloat& sum : line) sum = 0.0f;
  const auto add = [&](const auto& load) __attribute__((always_inline)) {
    vfloat rows[kRows];
    for (int i = 0; i < kRows; ++i) rows[i] = load(x + i * a.x_stride);
    for (int j = 0; j < kColumns; ++j) {
      const vfloat weights = load(w + j * a.weight_stride);
      for (int i = 0; i < kRows; ++i) sums[i][j] = fma(rows[i], weights, sums[i][j]);
    }
  };
  int64_t k = 0;
  for (; k + kLanes <= a.inner; k += kLanes) add([&](const T* p) __attribute__((always_inline)) { return Storage::load(p + k); });
  const int rest = static_cast<int>(a.inner - k);
  if (rest) add([&](const T* p) __attribute__((always_inline)) { return load_tail<Storage>(p + k, rest, 0); });
  const T* bias = static_cast<const T*>(a.bias);
  for (int i = 0; i < kRows; ++i) {
    float line[kColumns];
    if (kColumns == kColumnsAtOnce) {
      const Quad four = sum_lanes_of_four(sums[i]);
      std::memcpy(line, &four, sizeof line);
    } else {
      for (int j = 0; j < kColumns; ++j) line[j] = sum_lanes(sums[i][j]);
    }
    T* out = static_cast<T*>(a.out) + (row + i) * a.columns + column;
    for (int j = 0; j < kColumns; ++j) Storage::store_one(out + j, bias ? line[j] + Storage::load_one(bias + column + j) : line[j]);
  }
}

// Asks for the weights of the next columns while these are multiplied. (Beyond the last weight a prefetch is harmless: it never faults.)
template <class Storage>
FASTPPO_INLINE void prefetch_columns(const Linear& a, int64_t column) {
  constexpr int64_t kLine = 64 / sizeof(typename Storage::type);
  const auto* w = static_cast<const typename Storage::type*>(a.weight) + column * a.weight_stride;
  for (int j = 0; j < kColumnsAtOnce; ++j)
    for (int64_t k = 0; k < a.inner; k += kLine) __builtin_prefetch(w + j * a.weight_stride + k, 0, 2);
}

template <class Storage, int kColumns>
void multiply_rows(const Linear& a, int64_t column) {
  prefetch_columns<Storage>(a, column + kColumns);
  int64_t row = 0;
  for (; row + kRowsAtOnce <= a.rows; row += kRowsAtOnce) multiply_block<Storage, kRowsAtOnce, kColumns>(a, row, column);
  for (; row < a.rows; ++row) multiply_block<Storage, 1, kColumns>(a, row, column);
}

}  // namespace

void batch_invariant_linear(const Linear& a, int threads) {
  const int64_t blocks = (a.columns + kColumnsAtOnce - 1) / kColumnsAtOnce;
  const int64_t grain = std::max<int64_t>(1, kProductsWorthAThread / std::max<int64_t>(1, kColumnsAtOnce * a.rows * a.inner));
  parallel_ranges(blocks, threads, grain, [&](int64_t first, int64_t last) {
    with_storage(a.dtype, [&](auto storage) {
      using Storage = decltype(storage);
      for (int64_t block = first; block < last; ++block) {
        const int64_t column = block * kColumnsAtOnce;
        if (column + kColumnsAtOnce <= a.columns) multiply_rows<Storage, kColumnsAtOnce>(a, column);
        else
          for (int64_t c = column; c < a.columns; ++c) multiply_rows<Storage, 1>(a, c);
      }
    });
  });
}

}  // namespace fastppo::FASTPPO_ISA
