// x W^T + b for few rows of x, as decoding has them: weights are read once, where they lie, and each output is one sum in a fixed order, so that it does
// not depend on the other rows. (A general matrix product first copies the weights into its own order, which costs more than the product itself here.)
#include <algorithm>
#include <type_traits>

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
constexpr int64_t kTileColumns = 16;  // a cache line of fp32 results
constexpr int64_t kProductsWorthAThread = 1 << 19;  // about 10 microseconds, several times what it takes to wake a thread

// The sums of the lanes of every vector, in sum_lanes' order of additions.
template <int kRows, int kColumns>
FASTPPO_INLINE void sum_block(const vfloat (&sums)[kRows][kColumns], float* out) {
#if defined(__AVX512F__)
  if constexpr (kRows == 4 && kColumns == 4) {
    // With a mask of all lanes: without one, GCC 12 warns of the undefined lanes that its own header keeps.
    const auto fold_halves = [](__m512 a, __m512 b) {
      return _mm512_add_ps(_mm512_maskz_shuffle_f32x4(0xffff, a, b, 0x44), _mm512_maskz_shuffle_f32x4(0xffff, a, b, 0xee));
    };
    const auto fold_quads = [](__m512 a, __m512 b) {
      return _mm512_add_ps(_mm512_maskz_shuffle_f32x4(0xffff, a, b, 0x88), _mm512_maskz_shuffle_f32x4(0xffff, a, b, 0xdd));
    };
    __m512 folded[4];  // of each column: a quad a row
    for (int j = 0; j < 4; ++j)
      folded[j] = fold_quads(fold_halves(sums[0][j].part[0], sums[1][j].part[0]), fold_halves(sums[2][j].part[0], sums[3][j].part[0]));
    const auto fold_pairs = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee)); };
    const __m512 left = fold_pairs(folded[0], folded[1]), right = fold_pairs(folded[2], folded[3]);
    _mm512_storeu_ps(out, _mm512_add_ps(_mm512_shuffle_ps(left, right, 0x88), _mm512_shuffle_ps(left, right, 0xdd)));
    return;
  }
#endif
  for (int i = 0; i < kRows; ++i) {
    if constexpr (kColumns == 4) {
      const Quad four = sum_lanes_of_four(sums[i]);
      std::memcpy(out + 4 * i, &four, sizeof four);
    } else {
      for (int j = 0; j < kColumns; ++j) out[i * kColumns + j] = sum_lanes(sums[i][j]);
    }
  }
}

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
  float line[kRows * kColumns];
  sum_block<kRows, kColumns>(sums, line);
  for (int i = 0; i < kRows; ++i) {
    T* out = static_cast<T*>(a.out) + (row + i) * a.columns + column;
    for (int j = 0; j < kColumns; ++j) {
      const float sum = line[i * kColumns + j];
      Storage::store_one(out + j, bias ? sum + Storage::load_one(bias + column + j) : sum);
    }
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

// All rows of columns [first, last), at most kTileColumns: the weights stay in L1 from row to row, a row of x and its line of results from column to column.
template <class Storage>
void multiply_columns(const Linear& a, int64_t first, int64_t last) {
  const auto multiply_rows = [&](auto rows, int64_t row) {
    int64_t column = first;
    for (; column + kColumnsAtOnce <= last; column += kColumnsAtOnce) {
      if (row == 0) prefetch_columns<Storage>(a, column + kTileColumns);
      multiply_block<Storage, decltype(rows)::value, kColumnsAtOnce>(a, row, column);
    }
    for (; column < last; ++column) multiply_block<Storage, decltype(rows)::value, 1>(a, row, column);
  };
  int64_t row = 0;
  for (; row + kRowsAtOnce <= a.rows; row += kRowsAtOnce) multiply_rows(std::integral_constant<int, kRowsAtOnce>{}, row);
  for (; row < a.rows; ++row) multiply_rows(std::integral_constant<int, 1>{}, row);
}

}  // namespace

void batch_invariant_linear(const Linear& a, int threads) {
  const int64_t tiles = (a.columns + kTileColumns - 1) / kTileColumns;
  const int64_t grain = std::max<int64_t>(1, kProductsWorthAThread / std::max<int64_t>(1, kTileColumns * a.rows * a.inner));
  parallel_ranges(tiles, threads, grain, [&](int64_t first, int64_t last) {
    with_storage(a.dtype, [&](auto storage) {
      for (int64_t tile = first; tile < last; ++tile)
        multiply_columns<decltype(storage)>(a, tile * kTileColumns, std::min((tile + 1) * kTileColumns, a.columns));
    });
  });
}

}  // namespace fastppo::FASTPPO_ISA
