// x W^T + b for few rows of x, as decoding has them: weights are read once, where they lie, and each output is one sum in a fixed order, so that it does
// not depend on the other rows. (A general matrix product first copies the weights into its own order, which costs more than the product itself here.)
#include <algorithm>
#include <type_traits>

#include "parallel.h"

namespace fastppo::FASTPPO_ISA {
namespace {

// Outputs that are summed side by side: four columns, whose last additions are shared, and as many rows as there are registers for accumulators. Where
// a vector is several registers, one of them a pass over k: 3 rows x 4 columns, 3 of x and 1 of W are AVX2's sixteen registers, and two multiplications
// a cycle wait for no load. Of one row all of a vector in one pass: four accumulators would wait for each other.
constexpr int kColumnsAtOnce = 4;
#if defined(__AVX512F__)
constexpr int kRowsAtOnce = 4;
#else
constexpr int kRowsAtOnce = 3;
#endif
constexpr int64_t kInnerAtOnce = vfloat::kParts == 1 ? INT64_MAX / 2 : 512;  // of a pass: the lines stay in L1 for the next one
constexpr int64_t kTileColumns = 16;  // a cache line of fp32 results
constexpr int64_t kTileBytes = 1 << 14;  // of weights that stay in L1 beside rows of x
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

// Adds the products of kRows rows of x and kColumns of W to the sums' registers `part` to part + kParts. k counts up to `inner`, a multiple of 16.
template <class Storage, int kRows, int kColumns, int kParts>
FASTPPO_INLINE void multiply_parts(
    const Linear& a, const typename Storage::type* x, const typename Storage::type* w, int64_t inner, int part, bool first, vfloat (&sums)[kRows][kColumns]) {
  vfloat::Register parts[kRows][kColumns][kParts];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kColumns; ++j)
      for (int p = 0; p < kParts; ++p) parts[i][j][p] = first ? vfloat::Register{} : sums[i][j].part[part + p];
  for (int64_t k = part * kPartLanes; k < inner; k += kLanes) {
    vfloat::Register rows[kRows][kParts];
    for (int i = 0; i < kRows; ++i)
      for (int p = 0; p < kParts; ++p) rows[i][p] = Storage::load_part(x + i * a.x_stride + k + p * kPartLanes);
    for (int j = 0; j < kColumns; ++j)
      for (int p = 0; p < kParts; ++p) {
        const vfloat::Register weights = Storage::load_part(w + j * a.weight_stride + k + p * kPartLanes);
        for (int i = 0; i < kRows; ++i) parts[i][j][p] = fma(rows[i][p], weights, parts[i][j][p]);
      }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kColumns; ++j)
      for (int p = 0; p < kParts; ++p) sums[i][j].part[part + p] = parts[i][j][p];
}

// Adds the last `rest` < 16 products.
template <class Storage, int kRows, int kColumns>
void multiply_rest(
    const Linear& a, const typename Storage::type* x, const typename Storage::type* w, int rest, vfloat (&sums)[kRows][kColumns]) {
  vfloat rows[kRows];
  for (int i = 0; i < kRows; ++i) rows[i] = load_tail<Storage>(x + i * a.x_stride, rest, 0);
  for (int j = 0; j < kColumns; ++j) {
    const vfloat weights = load_tail<Storage>(w + j * a.weight_stride, rest, 0);
    for (int i = 0; i < kRows; ++i)
      for (int p = 0; p < vfloat::kParts; ++p) sums[i][j].part[p] = fma(rows[i].part[p], weights.part[p], sums[i][j].part[p]);
  }
}

// out[row, column] = the sums of the lanes, and the bias.
template <class Storage, int kRows, int kColumns>
FASTPPO_INLINE void store_block(const Linear& a, int64_t row, int64_t column, const vfloat (&sums)[kRows][kColumns]) {
  using T = typename Storage::type;
  const T* bias = static_cast<const T*>(a.bias);
  float line[kRows * kColumns], added[kColumns] = {};
  sum_block<kRows, kColumns>(sums, line);
  if (bias)
    for (int j = 0; j < kColumns; ++j) added[j] = Storage::load_one(bias + column + j);
  for (int i = 0; i < kRows; ++i) {
    T* out = static_cast<T*>(a.out) + (row + i) * a.columns + column;
    if (bias)
      for (int j = 0; j < kColumns; ++j) line[i * kColumns + j] += added[j];
    if constexpr (std::is_same_v<Storage, F32>) std::memcpy(out, line + i * kColumns, kColumns * sizeof(float));
    else
      for (int j = 0; j < kColumns; ++j) Storage::store_one(out + j, line[i * kColumns + j]);
  }
}

// out[row, column] of kRows rows of x and kColumns of W's. Never inline: where GCC inlines it beside the prefetches, one row is a tenth slower.
template <class Storage, int kRows, int kColumns>
__attribute__((noinline)) void multiply_block(const Linear& a, int64_t row, int64_t column) {
  using T = typename Storage::type;
  constexpr int kParts = kRows == 1 ? vfloat::kParts : 1;
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  const T* w = static_cast<const T*>(a.weight) + column * a.weight_stride;
  const int64_t whole = a.inner / kLanes * kLanes, at_once = kRows == 1 ? whole : kInnerAtOnce;
  vfloat sums[kRows][kColumns];
  int64_t k = 0;
  do {
    for (int part = 0; part < vfloat::kParts; part += kParts)
      multiply_parts<Storage, kRows, kColumns, kParts>(a, x + k, w + k, std::min(at_once, whole - k), part, k == 0, sums);
    k += at_once;
  } while (k < whole);
  if (whole < a.inner) multiply_rest<Storage>(a, x + whole, w + whole, static_cast<int>(a.inner - whole), sums);
  store_block<Storage>(a, row, column, sums);
}

// Asks for elements [first, last) of the next columns' weights while these are multiplied. (Beyond the last weight a prefetch is harmless: it never faults.)
template <class Storage>
FASTPPO_INLINE void prefetch_columns(const Linear& a, int64_t column, int64_t first, int64_t last) {
  constexpr int64_t kLine = 64 / sizeof(typename Storage::type);
  const auto* w = static_cast<const typename Storage::type*>(a.weight) + column * a.weight_stride;
  for (int j = 0; j < kColumnsAtOnce; ++j)
    for (int64_t k = first; k < last; k += kLine) __builtin_prefetch(w + j * a.weight_stride + k, 0, 2);
}

// How many columns go through the rows together: fewer than a line of results where that keeps their weights in L1.
template <class Storage>
int64_t tile_columns(const Linear& a) {
  const int64_t bytes = a.inner * sizeof(typename Storage::type);
  return kTileColumns * bytes > kTileBytes && kColumnsAtOnce * bytes <= kTileBytes ? kColumnsAtOnce : kTileColumns;
}

// All rows of columns [first, last), at most kTileColumns: the weights stay in L1 from row to row, a row of x and its line of results from column to column.
template <class Storage>
void multiply_columns(const Linear& a, int64_t first, int64_t last) {
  int64_t asked = 0;  // of the next tile's weights: the rows share them, so that memory is never asked for all at once
  const auto multiply_rows = [&](auto rows, int64_t row) {
    const int64_t ask = row + rows == a.rows ? a.inner : a.inner * (row + rows) / a.rows / kLanes * kLanes;
    int64_t column = first;
    for (; column + kColumnsAtOnce <= last; column += kColumnsAtOnce) {
      prefetch_columns<Storage>(a, column + kTileColumns, asked, ask);
      multiply_block<Storage, rows, kColumnsAtOnce>(a, row, column);
    }
    for (; column < last; ++column) multiply_block<Storage, rows, 1>(a, row, column);
    asked = ask;
  };
  int64_t row = 0;
  for (; row + kRowsAtOnce <= a.rows; row += kRowsAtOnce) multiply_rows(std::integral_constant<int, kRowsAtOnce>{}, row);
  if (kRowsAtOnce == 3 && row + 2 <= a.rows) multiply_rows(std::integral_constant<int, 2>{}, row), row += 2;
  for (; row < a.rows; ++row) multiply_rows(std::integral_constant<int, 1>{}, row);
}

}  // namespace

void batch_invariant_linear(const Linear& a, int threads) {
  const int64_t tiles = (a.columns + kTileColumns - 1) / kTileColumns;
  const int64_t grain = std::max<int64_t>(1, kProductsWorthAThread / std::max<int64_t>(1, kTileColumns * a.rows * a.inner));
  parallel_ranges(tiles, threads, grain, [&](int64_t first, int64_t last) {
    with_storage(a.dtype, [&](auto storage) {
      const int64_t end = std::min(last * kTileColumns, a.columns), width = tile_columns<decltype(storage)>(a);
      for (int64_t column = first * kTileColumns; column < end; column += width)
        multiply_columns<decltype(storage)>(a, column, std::min(column + width, end));
    });
  });
}

}  // namespace fastppo::FASTPPO_ISA
