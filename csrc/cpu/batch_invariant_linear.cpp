// x W^T + b for few rows of x, as decoding has them: weights are read once, where they lie, and each output is one sum in a fixed order, so that it does
// not depend on the other rows. (A general matrix product first copies the weights into its own order, which costs more than the product itself here.)
#include <algorithm>

#include "parallel.h"

namespace fastppo::FASTPPO_ISA {
namespace {

// Outputs that are summed side by side: as many accumulators as registers, less those for the operands.
#if defined(__AVX512F__)
constexpr int kRowsAtOnce = 4, kColumnsAtOnce = 6;
#else
constexpr int kRowsAtOnce = 3, kColumnsAtOnce = 2;
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
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kColumns; ++j) {
      const float sum = sum_lanes(sums[i][j]);
      Storage::store_one(static_cast<T*>(a.out) + (row + i) * a.columns + column + j, bias ? sum + Storage::load_one(bias + column + j) : sum);
    }
}

template <class Storage, int kColumns>
void multiply_rows(const Linear& a, int64_t column) {
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
