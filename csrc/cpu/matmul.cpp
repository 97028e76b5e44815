// Products of matrices whose sums have one order: an output is the sum, one after another, of chains of 64 fused multiply-adds that each begin with 0
// (short ones round less). Rows and columns are cut up as it suits registers, caches and threads, but an output's bits depend on nothing but its row of a and its column of b,
// on every instruction set that fuses. So a token has the same bits alone, as a decode step has it, among others, and in training.
//
// The blocking is Goto's (doi:10.1145/1356052.1356053): a panel of b, [inner block, a few registers wide], is copied into L1 and multiplied by strips
// of rows of a, which are read where they lie.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "parallel.h"

namespace fastppo::FASTPPO_ISA {
namespace {

constexpr int64_t kChain = 64;  // products whose sum is begun anew: part of the order of the sums
constexpr int64_t kInnerBlock = 4 * kChain;  // of a panel
constexpr int kStripRows = 6, kPanelRegisters = 2;  // their twelve accumulators, two registers of b and one of a are AVX2's sixteen, but for one
constexpr int kPanelColumns = kPanelRegisters * kPartLanes;
constexpr int64_t kRowBlock = 240;  // rows of a that stay in L2 while the panels of an inner block pass
constexpr int64_t kProductsWorthAThread = 1 << 19;  // about 10 microseconds, several times what it takes to wake a thread

using Register = vfloat::Register;

FASTPPO_INLINE Register load_register(const float* p) { return F32::load_part(p); }
FASTPPO_INLINE void store_register(float* p, const Register& r) { std::memcpy(p, &r, sizeof r); }

// Part of the outputs: what a thread makes.
struct Range {
  int64_t first_row, last_row, first_column, last_column;
};

// fp32 sums [rows, columns] of a range: the outputs themselves, or what is rounded into them at the end.
struct Sums {
  float* data;
  int64_t stride;
};

// Columns [first, first + width) of b for products [k, k + count), as fp32 [count, kPanelColumns]; columns beyond are 0.
template <class Storage>
void copy_rows(const Matmul& m, int64_t k, int64_t count, int64_t first, int width, float* panel) {
  const auto* b = static_cast<const typename Storage::type*>(m.b) + k * m.b_inner + first;
  for (int64_t i = 0; i < count; ++i, b += m.b_inner, panel += kPanelColumns) {
    if (width == kPanelColumns) {
      for (int r = 0; r < kPanelRegisters; ++r) store_register(panel + r * kPartLanes, Storage::load_part(b + r * kPartLanes));
    } else {
      for (int j = 0; j < kPanelColumns; ++j) panel[j] = j < width ? Storage::load_one(b + j) : 0.0f;
    }
  }
}

// The same panel of a b whose columns lie one after another, [columns, inner].
template <class Storage>
void transpose_columns(const Matmul& m, int64_t k, int64_t count, int64_t first, int width, float* panel) {
  const auto* b = static_cast<const typename Storage::type*>(m.b) + first * m.b_column + k;
  int j = 0;
#if defined(__AVX2__)
  const int64_t eights = count / 8 * 8;
  for (; j + 8 <= width; j += 8) {
    for (int64_t i = 0; i < eights; i += 8) {
      __m256 columns[8];
      transpose_eight<Storage>(b + j * m.b_column + i, m.b_column, columns);
      for (int n = 0; n < 8; ++n) _mm256_storeu_ps(panel + (i + n) * kPanelColumns + j, columns[n]);
    }
    for (int64_t i = eights; i < count; ++i)
      for (int n = 0; n < 8; ++n) panel[i * kPanelColumns + j + n] = Storage::load_one(b + (j + n) * m.b_column + i);
  }
#endif
  for (; j < kPanelColumns; ++j)
    for (int64_t i = 0; i < count; ++i) panel[i * kPanelColumns + j] = j < width ? Storage::load_one(b + j * m.b_column + i) : 0.0f;
}

// Adds a chain's products of kRows rows of a and a panel to the sums, or begins these.
template <int kRows>
FASTPPO_INLINE void multiply_strip(const float* a, int64_t a_row, int64_t a_inner, const float* panel, int64_t count, bool begin, int width, const Sums& sums) {
  Register total[kRows][kPanelRegisters] = {};
  int64_t place = 0;
  for (int64_t k = 0; k < count; ++k, place += a_inner) {
    Register b[kPanelRegisters];
#pragma GCC unroll 8
    for (int r = 0; r < kPanelRegisters; ++r) b[r] = load_register(panel + k * kPanelColumns + r * kPartLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Register x = vfloat::broadcast(a[i * a_row + place]);
#pragma GCC unroll 8
      for (int r = 0; r < kPanelRegisters; ++r) total[i][r] = fma(x, b[r], total[i][r]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    float* out = sums.data + i * sums.stride;
    if (width == kPanelColumns) {
#pragma GCC unroll 8
      for (int r = 0; r < kPanelRegisters; ++r) {
        float* part = out + r * kPartLanes;
        store_register(part, begin ? total[i][r] : load_register(part) + total[i][r]);
      }
    } else {
      float line[kPanelColumns];
#pragma GCC unroll 8
      for (int r = 0; r < kPanelRegisters; ++r) store_register(line + r * kPartLanes, total[i][r]);
      for (int j = 0; j < width; ++j) out[j] = begin ? line[j] : out[j] + line[j];
    }
  }
}

// Calls body(kRows) for strips that together are `rows` rows, as equal as they can be.
template <class Body>
FASTPPO_INLINE void for_strips(int64_t rows, const Body& body) {
  const int64_t strips = (rows + kStripRows - 1) / kStripRows;
  for (int64_t i = 0; i < strips; ++i) {
    const int64_t first = rows * i / strips, height = rows * (i + 1) / strips - first;
    if (height == 6) body(std::integral_constant<int, 6>{}, first);
    else if (height == 5) body(std::integral_constant<int, 5>{}, first);
    else if (height == 4) body(std::integral_constant<int, 4>{}, first);
    else if (height == 3) body(std::integral_constant<int, 3>{}, first);
    else if (height == 2) body(std::integral_constant<int, 2>{}, first);
    else body(std::integral_constant<int, 1>{}, first);
  }
}

// A block of a as fp32: itself, or a copy [rows, count].
struct ABlock {
  const float* data;
  int64_t row, inner;
};

template <class Storage>
ABlock a_block(const Matmul& m, int64_t row, int64_t rows, int64_t k, int64_t count, std::vector<float>& memory) {
  const auto* a = static_cast<const typename Storage::type*>(m.a) + row * m.a_row + k * m.a_inner;
  if constexpr (std::is_same_v<Storage, F32>)
    if (m.a_inner == 1) return {a, m.a_row, m.a_inner};
  memory.resize(rows * count);
  int64_t i = 0;
#if defined(__AVX2__)
  if (m.a_row == 1)
    for (; i + 8 <= rows; i += 8) {
      int64_t j = 0;
      for (; j + 8 <= count; j += 8) {
        __m256 lines[8];
        transpose_eight<Storage>(a + i + j * m.a_inner, m.a_inner, lines);
        for (int n = 0; n < 8; ++n) _mm256_storeu_ps(memory.data() + (i + n) * count + j, lines[n]);
      }
      for (; j < count; ++j)
        for (int n = 0; n < 8; ++n) memory[(i + n) * count + j] = Storage::load_one(a + i + n + j * m.a_inner);
    }
#endif
  for (; i < rows; ++i)
    for (int64_t j = 0; j < count; ++j) memory[i * count + j] = Storage::load_one(a + i * m.a_row + j * m.a_inner);
  return {memory.data(), count, 1};
}

// Rows [first, last) of a block on their way to L2, while the ones before them are multiplied: the first panel meets them in memory. (L1 is the panel's.)
FASTPPO_INLINE void fetch_rows(const ABlock& a, int64_t first, int64_t last, int64_t count) {
  constexpr int kToL2 = 2;
  for (int64_t row = first; row < last; ++row)
    for (int64_t i = 0; i < count; i += 64 / sizeof(float)) __builtin_prefetch(a.data + row * a.row + i, 0, kToL2);
}

template <class Storage>
void add_products(const Matmul& m, const Range& range, const Sums& sums) {
  alignas(64) float panel[kInnerBlock * kPanelColumns];
  std::vector<float> memory;
  for (int64_t row = range.first_row; row < range.last_row; row += kRowBlock) {
    const int64_t rows = std::min(kRowBlock, range.last_row - row);
    for (int64_t k = 0; k < m.inner; k += kInnerBlock) {
      const int64_t count = std::min(kInnerBlock, m.inner - k);
      const ABlock a = a_block<Storage>(m, row, rows, k, count, memory);
      for (int64_t column = range.first_column; column < range.last_column; column += kPanelColumns) {
        const int width = static_cast<int>(std::min<int64_t>(kPanelColumns, range.last_column - column));
        if (m.b_column == 1) copy_rows<Storage>(m, k, count, column, width, panel);
        else transpose_columns<Storage>(m, k, count, column, width, panel);
        float* corner = sums.data + (row - range.first_row) * sums.stride + column - range.first_column;
        for_strips(rows, [&](auto height, int64_t first) {
          if (column == range.first_column) fetch_rows(a, first + height, std::min(first + 2 * height, rows), count);
          const Sums strip{corner + first * sums.stride, sums.stride};
          for (int64_t i = 0; i < count; i += kChain)
            multiply_strip<height>(a.data + first * a.row + i * a.inner, a.row, a.inner, panel + i * kPanelColumns, std::min(kChain, count - i),
                                   k + i == 0 && !m.accumulate, width, strip);
        });
      }
    }
  }
}

// Rounds the sums of a range into the outputs, with the bias.
template <class Storage>
void finish(const Matmul& m, const Range& range, const Sums& sums) {
  using T = typename Storage::type;
  const T* bias = static_cast<const T*>(m.bias);
  const int64_t columns = range.last_column - range.first_column;
  for (int64_t row = range.first_row; row < range.last_row; ++row) {
    const float* from = sums.data + (row - range.first_row) * sums.stride;
    T* out = static_cast<T*>(m.out) + row * m.out_row + range.first_column;
    int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) {
      const vfloat sum = F32::load(from + j);
      Storage::store(out + j, bias ? sum + Storage::load(bias + range.first_column + j) : sum);
    }
    for (; j < columns; ++j) Storage::store_one(out + j, bias ? from[j] + Storage::load_one(bias + range.first_column + j) : from[j]);
  }
}

template <class Storage>
void multiply(const Matmul& m, const Range& range) {
  const int64_t columns = range.last_column - range.first_column, rows = range.last_row - range.first_row;
  if constexpr (std::is_same_v<Storage, F32>) {
    const Sums sums{static_cast<float*>(m.out) + range.first_row * m.out_row + range.first_column, m.out_row};
    if (m.inner == 0 && !m.accumulate)
      for (int64_t row = 0; row < rows; ++row) std::fill_n(sums.data + row * sums.stride, columns, 0.0f);
    add_products<Storage>(m, range, sums);
    if (m.bias) finish<Storage>(m, range, sums);
  } else {
    std::vector<float> memory(rows * columns);
    const Sums sums{memory.data(), columns};
    add_products<Storage>(m, range, sums);
    finish<Storage>(m, range, sums);
  }
}

#if defined(__AVX2__)
// Few rows: b's columns are turned in registers as they come from memory, and nothing is copied.
constexpr int kFewRows = 4;

template <class Storage, int kRows, int kGroups>
FASTPPO_INLINE void multiply_few_columns(const Matmul& m, int64_t row, int64_t column) {
  using T = typename Storage::type;
  const T* a = static_cast<const T*>(m.a) + row * m.a_row;
  const T* b = static_cast<const T*>(m.b) + column * m.b_column;
  constexpr int64_t kLine = 64 / sizeof(T);
  __m256 sums[kRows][kGroups] = {};
  for (int64_t begin = 0; begin < m.inner; begin += kChain) {
    const int64_t end = std::min(begin + kChain, m.inner), eights = begin + (end - begin) / 8 * 8;
    __m256 total[kRows][kGroups] = {};
    for (int64_t k = begin; k < eights; k += kLine)
#pragma GCC unroll 8
      for (int g = 0; g < kGroups; ++g)
        for (int64_t half = k; half < std::min(k + kLine, eights); half += 8) {
          __m256 columns[8];
          transpose_eight<Storage>(b + g * 8 * m.b_column + half, m.b_column, columns);
#pragma GCC unroll 8
          for (int n = 0; n < 8; ++n)
#pragma GCC unroll 8
            for (int i = 0; i < kRows; ++i)
              total[i][g] = _mm256_fmadd_ps(_mm256_set1_ps(Storage::load_one(a + i * m.a_row + half + n)), columns[n], total[i][g]);
        }
    for (int64_t k = eights; k < end; ++k)
#pragma GCC unroll 8
      for (int g = 0; g < kGroups; ++g) {
        alignas(32) float column_k[8];
        for (int j = 0; j < 8; ++j) column_k[j] = Storage::load_one(b + (g * 8 + j) * m.b_column + k);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i)
          total[i][g] = _mm256_fmadd_ps(_mm256_set1_ps(Storage::load_one(a + i * m.a_row + k)), _mm256_load_ps(column_k), total[i][g]);
      }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int g = 0; g < kGroups; ++g) sums[i][g] = begin == 0 ? total[i][g] : sums[i][g] + total[i][g];
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) {
      alignas(32) float line[8];
      _mm256_store_ps(line, sums[i][g]);
      T* out = static_cast<T*>(m.out) + (row + i) * m.out_row + column + g * 8;
      const T* bias = static_cast<const T*>(m.bias) + column + g * 8;
      for (int j = 0; j < 8; ++j) Storage::store_one(out + j, m.bias ? line[j] + Storage::load_one(bias + j) : line[j]);
    }
}

template <class Storage, int kRows>
void multiply_few(const Matmul& m, const Range& range) {
  constexpr int kGroups = kRows == 1 ? 4 : 2;
  int64_t column = range.first_column;
  for (; column + 8 * kGroups <= range.last_column; column += 8 * kGroups) multiply_few_columns<Storage, kRows, kGroups>(m, range.first_row, column);
  for (; column + 8 <= range.last_column; column += 8) multiply_few_columns<Storage, kRows, 1>(m, range.first_row, column);
  if (column < range.last_column) multiply<Storage>(m, {range.first_row, range.last_row, column, range.last_column});
}
#endif

// Some rows of a, and columns of b that lie one after another, as those of a layer's weight do: the transposed product. Its panels are made of the
// rows of a, and b is read where it lies. An output is the same sum of the same products.
constexpr int64_t kMostSwappedRows = 128;

FASTPPO_INLINE bool pays_swapped(const Matmul& m, int64_t rows) {
  const int64_t lanes = (rows + kPanelColumns - 1) / kPanelColumns * kPanelColumns;
  return m.b_inner == 1 && m.a_inner == 1 && m.inner > 0 && !m.accumulate && rows <= kMostSwappedRows && 4 * rows >= 3 * lanes;
}

template <class Storage>
void multiply_swapped(const Matmul& m, const Range& range) {
  Matmul swapped = m;
  swapped.a = m.b, swapped.a_row = m.b_column, swapped.a_inner = 1;
  swapped.b = m.a, swapped.b_column = m.a_row, swapped.b_inner = 1;
  const int64_t rows = range.last_row - range.first_row;
  std::vector<float> sums(kRowBlock * rows), turned(kRowBlock * rows);
  for (int64_t column = range.first_column; column < range.last_column; column += kRowBlock) {
    const Range part{range.first_row, range.last_row, column, std::min(column + kRowBlock, range.last_column)};
    const int64_t columns = part.last_column - column;
    add_products<Storage>(swapped, {column, part.last_column, range.first_row, range.last_row}, {sums.data(), rows});
    transpose(sums.data(), columns, rows, turned.data());
    finish<Storage>(m, part, {turned.data(), columns});
  }
}

template <class Storage>
void multiply_range(const Matmul& m, const Range& range) {
#if defined(__AVX2__)
  const int64_t rows = range.last_row - range.first_row;
  if (rows <= kFewRows && m.b_inner == 1 && m.a_inner == 1 && !m.accumulate) {
    if (rows == 1) return multiply_few<Storage, 1>(m, range);
    if (rows == 2) return multiply_few<Storage, 2>(m, range);
    if (rows == 3) return multiply_few<Storage, 3>(m, range);
    return multiply_few<Storage, 4>(m, range);
  }
#endif
  if (pays_swapped(m, range.last_row - range.first_row)) multiply_swapped<Storage>(m, range);
  else multiply<Storage>(m, range);
}

}  // namespace

void matmul(const Matmul& m, int threads) {
  if (m.rows == 0 || m.columns == 0) return;
  // Threads share the columns, and the rows too where there are fewer panels than threads.
  const int64_t panels = (m.columns + kPanelColumns - 1) / kPanelColumns, strips = (m.rows + kStripRows - 1) / kStripRows;
  const int64_t bands = std::min<int64_t>(strips, (threads + panels - 1) / panels);
  const int64_t products = std::max<int64_t>(1, m.rows * m.inner / bands * kPanelColumns);
  parallel_ranges(panels * bands, threads, std::max<int64_t>(1, kProductsWorthAThread / products), [&](int64_t first, int64_t last) {
    with_storage(m.dtype, [&](auto storage) {
      for (int64_t i = first; i < last;) {
        const int64_t band = i / panels, first_panel = i % panels, last_panel = std::min(panels, first_panel + last - i);
        const int64_t first_row = m.rows * band / bands, last_row = m.rows * (band + 1) / bands;
        multiply_range<decltype(storage)>(m, {first_row, last_row, first_panel * kPanelColumns, std::min(last_panel * kPanelColumns, m.columns)});
        i += last_panel - first_panel;
      }
    });
  });
}

}  // namespace fastppo::FASTPPO_ISA
