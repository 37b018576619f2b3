// Traffic: every matrix is read or written once, in tiles of 32 x 32 that stay in the first cache. Tiles
// of matrices that lie column by column are turned there. Threads share columns, so that a column's sum
// is the work of one thread.
#include "gated_unit.h"

#include <algorithm>
#include <cstring>

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
TOKENFLEX_VERSIONS void multiply(const T* __restrict gate, const T* __restrict up,
                                 T* __restrict product, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const auto silu = activation(widened(gate[i]));
    product[i] = rounded<T>(silu.value * widened(up[i]));
  }
}

// Some columns of up to kSide rows; the strides are in elements.
template <class T>
struct Gradients {
  const T *gate, *up;
  int64_t stride;  // of gate and up
  const T* grad;
  int64_t grad_stride;
  T *grad_gate, *grad_up;
  T* product;  // or null
  int64_t hidden;
  SumOf<T>*gate_sums, *up_sums;  // to add the columns to, or null
};

template <class T>
TOKENFLEX_VERSIONS void differentiate(const Gradients<T>& part, int64_t rows, int64_t columns) {
  using Real = SumOf<T>;
  Real gate_sum[kChunk], up_sum[kChunk];
  std::fill_n(gate_sum, columns, Real(0));
  std::fill_n(up_sum, columns, Real(0));
  for (int64_t row = 0; row < rows; ++row) {
    const T *gate = part.gate + row * part.stride, *up = part.up + row * part.stride;
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
  // To the right of this one, as far as it is before column `end`.
  Place next(int64_t end) const {
    const int64_t begin = column + columns;
    return {row, begin, rows, std::min(columns, end - begin)};
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
template <int kWrite, class T>
void prefetch(const Matrix<T>& of, const Place& place) {
  constexpr int64_t kLine = 64 / int64_t(sizeof(T));
  for (int64_t r = 0; r < place.rows; ++r) {
    for (int64_t c = 0; c < place.columns; c += kLine) {
      __builtin_prefetch(of.row(place, r) + c, kWrite);
    }
  }
}

template <class T>
void load_turned(const Matrix<const T>& from, const Place& place, T* tile) {
  T across[kTile];
  load(from, place.turned(), across);
  turn(across, tile);
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
void multiply_all(const GateUp& inputs, void* product, int threads) {
  const int64_t count = inputs.rows * inputs.hidden, bytes = 3 * count * int64_t(sizeof(T));
  if (!inputs.by_columns) {
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
    for_tiles(inputs.rows, begin, end, kSide, [&](const Place& place) {
      T g[kTile], u[kTile], p[kTile];
      const Place next = place.next(end);
      prefetch<0>(gate, next.turned());
      prefetch<0>(up, next.turned());
      prefetch<1>(out, place);
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
  const int64_t length = inputs.by_columns ? rows : hidden;
  const auto gate = matrix<T>(inputs.gate, length), up = matrix<T>(inputs.up, length);
  const Matrix<const T> grad = {reinterpret_cast<const T*>(results.grad.data), results.grad.stride};
  const auto grads = matrix<T>(results.grads, 2 * hidden);
  const auto product = matrix<T>(results.product, hidden);
  Real* sums = static_cast<Real*>(results.sums);
  const int64_t bytes = 6 * rows * hidden * int64_t(sizeof(T));
  const int64_t width = inputs.by_columns ? kSide : kChunk;
  share_columns(hidden, bytes, threads, [&](int64_t begin, int64_t end) {
    for_tiles(rows, begin, end, width, [&](const Place& place) {
      T g[kTile], u[kTile];
      const Place up_place = {place.row, hidden + place.column, place.rows, place.columns};
      Gradients<T> part = {};
      if (inputs.by_columns) {
        load_turned(gate, place, g);
        load_turned(up, place, u);
        part.gate = g, part.up = u, part.stride = kSide;
      } else {
        part.gate = gate.row(place, 0), part.up = up.row(place, 0), part.stride = hidden;
      }
      part.grad = grad.row(place, 0), part.grad_stride = grad.stride / int64_t(sizeof(T));
      part.grad_gate = grads.row(place, 0), part.grad_up = grads.row(up_place, 0);
      part.product = product.data ? product.row(place, 0) : nullptr, part.hidden = hidden;
      if (sums) part.gate_sums = sums + place.column, part.up_sums = sums + up_place.column;
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
    for_tiles(rows, begin, end, kSide, [&](const Place& place) {
      Bits tile[kTile];
      load(source, place, tile);
      store_turned(tile, place, result);
    });
  });
}

}  // namespace

void gated_product(const GateUp& inputs, void* product, const std::string& dtype, int threads) {
  with_dtype(dtype, [&](auto element) {
    multiply_all<decltype(element)>(inputs, product, threads);
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
