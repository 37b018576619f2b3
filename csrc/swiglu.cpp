// Traffic: every matrix is read or written once. What lies column by column is turned in tiles of 32 x 32
// that stay in the first cache. Threads share columns, so that a column's sum is the work of one thread.
#include "swiglu.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "activation.h"
#include "dtypes.h"
#include "threads.h"
#include "vectors.h"

namespace tokenflex {
namespace {

constexpr int64_t kSide = 32;
constexpr int64_t kTile = kSide * kSide;
constexpr int64_t kChunk = 512;  // columns at a time where nothing is turned

// ---- One tile, as vector instructions.

template <class T>
TOKENFLEX_VERSIONS void multiply(const T* gate, const T* __restrict up, T* product,
                                 int64_t count) {
#pragma GCC ivdep  // product may be gate itself
  for (int64_t i = 0; i < count; ++i) {
    const auto silu = activation(widened(gate[i]));
    product[i] = rounded<T>(silu.value * widened(up[i]));
  }
}

// Some columns of up to kSide rows; strides are in elements.
template <class T>
struct Gradients {
  const T *gate, *up, *grad;
  int64_t hidden, grad_stride;
  T *grad_gate, *grad_up;
  T* product;                    // or null
  SumOf<T>*gate_sums, *up_sums;  // to add the columns to, or null
};

template <class T>
TOKENFLEX_VERSIONS void differentiate(const Gradients<T>& part, int64_t rows, int64_t columns) {
  using Real = SumOf<T>;
  Real gate_sum[kChunk], up_sum[kChunk];
  std::fill_n(gate_sum, columns, Real(0));
  std::fill_n(up_sum, columns, Real(0));
  for (int64_t row = 0; row < rows; ++row) {
    const T *gate = part.gate + row * part.hidden, *up = part.up + row * part.hidden;
    const T* grad = part.grad + row * part.grad_stride;
    T *grad_gate = part.grad_gate + 2 * row * part.hidden;
    T *grad_up = part.grad_up + 2 * row * part.hidden;
    Real g[kChunk], u[kChunk], d[kChunk], p[kChunk];
    for (int64_t i = 0; i < columns; ++i) g[i] = widened(gate[i]);
    for (int64_t i = 0; i < columns; ++i) u[i] = widened(up[i]);
    for (int64_t i = 0; i < columns; ++i) d[i] = widened(grad[i]);
    for (int64_t i = 0; i < columns; ++i) {
      const auto silu = activation(g[i]);
      p[i] = silu.value * u[i];
      g[i] = d[i] * u[i] * silu.derivative;
      u[i] = d[i] * silu.value;
      gate_sum[i] += g[i];
      up_sum[i] += u[i];
    }
    for (int64_t i = 0; i < columns; ++i) grad_gate[i] = rounded<T>(g[i]);
    for (int64_t i = 0; i < columns; ++i) grad_up[i] = rounded<T>(u[i]);
    if (!part.product) continue;
    T* product = part.product + row * part.hidden;
    for (int64_t i = 0; i < columns; ++i) product[i] = rounded<T>(p[i]);
  }
  if (!part.gate_sums) return;
  for (int64_t i = 0; i < columns; ++i) part.gate_sums[i] += gate_sum[i];
  for (int64_t i = 0; i < columns; ++i) part.up_sums[i] += up_sum[i];
}

// Interleaves the halves of a tile: rotates the ten bits of an element's index by one.
template <class Bits>
TOKENFLEX_INLINE void interleave(const Bits* __restrict from, Bits* __restrict to) {
  for (int64_t i = 0; i < kTile / 2; ++i) {
    to[2 * i] = from[i];
    to[2 * i + 1] = from[i + kTile / 2];
  }
}

// Rotates by five of the ten bits: those of row and column change places.
template <class Bits>
TOKENFLEX_VERSIONS void turn(const Bits* from, Bits* to) {
  Bits between[kTile];
  interleave(from, to);
  interleave(to, between);
  interleave(between, to);
  interleave(to, between);
  interleave(between, to);
}

void turn(const Bfloat16* from, Bfloat16* to) { turn(&from->bits, &to->bits); }
void turn(const Half* from, Half* to) { turn(&from->bits, &to->bits); }

// ---- Tiles of matrices.

// Where a tile lies in a matrix, and how much of it is within.
struct Place {
  int64_t row, column, rows, columns;

  Place turned() const { return {column, row, columns, rows}; }
  Place below(int64_t end) const {
    return {row + rows, column, std::min(rows, end - row - rows), columns};
  }
};

// Rows of contiguous elements; the stride is in bytes.
template <class T>
struct Matrix {
  T* data;
  int64_t stride;

  T* row(const Place& place, int64_t index) const {
    return reinterpret_cast<T*>(uintptr_t(data) + uintptr_t((place.row + index) * stride)) +
           place.column;
  }
};

template <class T>
Matrix<T> matrix(void* data, int64_t columns) {
  return {static_cast<T*>(data), columns * int64_t(sizeof(T))};
}

template <class T>
Matrix<const T> matrix(const void* data, int64_t columns) {
  return {static_cast<const T*>(data), columns * int64_t(sizeof(T))};
}

// Places outside of the matrix are 0, which adds nothing to a sum.
template <class T>
void load(const Matrix<const T>& from, const Place& place, T* tile) {
  const bool whole = place.rows == kSide && place.columns == kSide;
  if (!whole) std::memset(static_cast<void*>(tile), 0, kTile * sizeof(T));
  for (int64_t r = 0; r < place.rows; ++r, tile += kSide) {
    std::memcpy(tile, from.row(place, r), size_t(whole ? kSide : place.columns) * sizeof(T));
  }
}

template <class T>
void store(const T* tile, const Place& place, const Matrix<T>& to) {
  const bool whole = place.columns == kSide;
  for (int64_t r = 0; r < place.rows; ++r, tile += kSide) {
    std::memcpy(to.row(place, r), tile, size_t(whole ? kSide : place.columns) * sizeof(T));
  }
}

// Asks for a tile ahead of its use: its rows lie too far apart for the processor to foresee them.
template <class T>
void prefetch(const Matrix<T>& of, const Place& place) {
  constexpr int64_t kLine = 64 / int64_t(sizeof(T));
  for (int64_t r = 0; r < place.rows; ++r) {
    for (int64_t c = 0; c < place.columns; c += kLine) {
      __builtin_prefetch(of.row(place, r) + c, !std::is_const_v<T>);
    }
  }
}

template <class T>
void store_turned(const T* tile, const Place& place, const Matrix<T>& to) {
  T across[kTile];
  turn(tile, across);
  store(across, place.turned(), to);
}

// Calls work(place) for the tiles of columns [begin, end), to the right and then down the rows.
template <class Work>
void for_tiles(int64_t rows, int64_t begin, int64_t end, int64_t width, const Work& work) {
  for (int64_t row = 0; row < rows; row += kSide) {
    for (int64_t column = begin; column < end; column += width) {
      work(Place{row, column, std::min(kSide, rows - row), std::min(width, end - column)});
    }
  }
}

// The same in tiles of kSide columns, down the rows and then to the right: matrices that lie column by
// column are read one row of theirs after another.
template <class Work>
void for_tiles_down(int64_t rows, int64_t begin, int64_t end, const Work& work) {
  for (int64_t column = begin; column < end; column += kSide) {
    for_tiles(rows, column, std::min(end, column + kSide), kSide, work);
  }
}

// Calls work(begin, end) for each thread's share of the columns, in whole tiles.
template <class Work>
void share_columns(int64_t columns, int64_t bytes, int threads, const Work& work) {
  const int64_t tiles = (columns + kSide - 1) / kSide;
  in_parts(tiles, worthwhile_parts(tiles, bytes, threads), [&](int64_t begin, int64_t end) {
    work(begin * kSide, std::min(columns, end * kSide));
  });
}

// ---- Whole matrices.

template <class T>
void multiply_all(const GateUp& inputs, bool by_columns, void* product, int threads) {
  const int64_t count = inputs.rows * inputs.hidden, bytes = 3 * count * int64_t(sizeof(T));
  if (!by_columns) {
    const T *gate = static_cast<const T*>(inputs.gate), *up = static_cast<const T*>(inputs.up);
    T* out = static_cast<T*>(product);
    in_parts(count, worthwhile_parts(count, bytes, threads), [&](int64_t begin, int64_t end) {
      multiply(gate + begin, up + begin, out + begin, end - begin);
    });
    return;
  }
  const auto gate = matrix<T>(inputs.gate, inputs.rows), up = matrix<T>(inputs.up, inputs.rows);
  const auto out = matrix<T>(product, inputs.hidden);
  share_columns(inputs.hidden, bytes, threads, [&](int64_t begin, int64_t end) {
    for_tiles_down(inputs.rows, begin, end, [&](const Place& place) {
      T g[kTile], u[kTile], p[kTile];
      prefetch(out, place);
      load(gate, place.turned(), g);
      load(up, place.turned(), u);
      multiply(g, u, p, kTile);
      store_turned(p, place.turned(), out);
    });
  });
}

template <class T>
void differentiate_all(const GateUp& inputs, const GateGradients& results, int threads) {
  using Real = SumOf<T>;
  const int64_t rows = inputs.rows, hidden = inputs.hidden;
  const auto gate = matrix<T>(inputs.gate, hidden), up = matrix<T>(inputs.up, hidden);
  const Matrix<const T> grad = {reinterpret_cast<const T*>(results.grad.data), results.grad.stride};
  const auto grads = matrix<T>(results.grads, 2 * hidden);
  const auto product = matrix<T>(results.product, hidden);
  Real* sums = static_cast<Real*>(results.sums);
  const int64_t bytes = 6 * rows * hidden * int64_t(sizeof(T));
  share_columns(hidden, bytes, threads, [&](int64_t begin, int64_t end) {
    for_tiles(rows, begin, end, kChunk, [&](const Place& place) {
      T* grad_gate = grads.row(place, 0);
      const Gradients<T> part = {gate.row(place, 0),
                                 up.row(place, 0),
                                 grad.row(place, 0),
                                 hidden,
                                 grad.stride / int64_t(sizeof(T)),
                                 grad_gate,
                                 grad_gate + hidden,
                                 product.data ? product.row(place, 0) : nullptr,
                                 sums ? sums + place.column : nullptr,
                                 sums ? sums + hidden + place.column : nullptr};
      differentiate(part, place.rows, place.columns);
    });
  });
}

template <class Bits>
void transpose_all(const ConstRows& from, void* to, int64_t rows, int64_t columns, int threads) {
  const Matrix<const Bits> source = {reinterpret_cast<const Bits*>(from.data), from.stride};
  const auto result = matrix<Bits>(to, rows);
  const int64_t bytes = 2 * rows * columns * int64_t(sizeof(Bits));
  share_columns(columns, bytes, threads, [&](int64_t begin, int64_t end) {
    for_tiles_down(rows, begin, end, [&](const Place& place) {
      prefetch(source, place.below(rows));
      Bits tile[kTile];
      load(source, place, tile);
      store_turned(tile, place, result);
    });
  });
}

}  // namespace

void gated_product(const GateUp& inputs, bool by_columns, void* product, const std::string& dtype,
                   int threads) {
  with_dtype(dtype, [&](auto element) {
    multiply_all<decltype(element)>(inputs, by_columns, product, threads);
  });
}

void gate_gradients(const GateUp& inputs, const GateGradients& results, const std::string& dtype,
                    int threads) {
  with_dtype(dtype, [&](auto element) {
    differentiate_all<decltype(element)>(inputs, results, threads);
  });
}

void transpose(const ConstRows& from, void* to, int64_t rows, int64_t columns,
               const std::string& dtype, int threads) {
  with_dtype(dtype, [&](auto element) {
    transpose_all<decltype(element)>(from, to, rows, columns, threads);
  });
}

}  // namespace tokenflex
