// Few rows of input, in floats: codes are multiplied as they are decoded.
//
// The inputs are laid out once for all rows of the weight in the order of the pieces, each filled up with zeros to whole
// vectors; a code that is read behind the end of a piece meets a zero. A code is not even shifted: masked in its place it is
// code · 2^right, which a float holds exactly, and the power of two goes into the scale. Only one at the sign has to be.
#pragma once

#include <ATen/Parallel.h>

#include <type_traits>

#include "weight.h"

namespace {

constexpr int64_t INPUTS = 8;       // rows of input that share the decoding of a code, at most
constexpr int64_t CHUNK = 64;       // vectors of so many rows of input that are used while in the first cache
constexpr int64_t GRAIN = 1 << 16;  // weights that are worth a thread

// Inputs in the order of the pieces: [piece][vector][row of input][lane], zeros where a piece or the rows end.
struct Inputs {
  const int64_t count, width;  // rows of input, and how many there is room for: 1, 2, 4 or 8
  Buffer<float> values;

  Inputs(const float* x, int64_t count_, const Layout& layout)
      : count(count_), width(count_ > 4 ? INPUTS : count_ > 2 ? 4 : count_), values(layout.vectors * width * LANES) {
    float* to = values.data();
    for (const Piece& piece : layout.pieces) {
      for (int64_t v = 0; v < piece.vectors; ++v, to += width * LANES) {
        const int64_t column = piece.first + v * LANES, filled = std::min(LANES, piece.count - v * LANES);
        for (int64_t m = 0; m < count; ++m) std::memcpy(to + m * LANES, x + m * layout.columns + column, sizeof(float) * filled);
      }
    }
  }
};

// One piece of R rows of the weight, times M rows of input.
template <int M, int R, typename Weights>
__attribute__((always_inline)) inline void add(Floats (&sums)[R][M], const float* x, int64_t end, const Weights& weights) {
  for (int64_t i = 0; i < end; i += LANES) {
    Floats inputs[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      inputs[m] = load<Floats>(x + i * M + m * LANES);
#if defined(__AVX2__)
      if (R > 1) asm("" : "+x"(inputs[m]));  // loaded once, not by each of the rows
#endif
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Floats weight = weights(r, i);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sums[r][m] = fma(weight, inputs[m], sums[r][m]);
    }
  }
}

// Codes of a piece, times a power of two if they do not reach the sign.
template <bool TOP>
struct Codes {
  const Words mask;
  const uint32_t right;
  explicit Codes(const Piece& piece) : mask(Words{} + piece.mask), right(piece.right) {}
  inline Floats operator()(const int32_t* at) const { return floats(TOP ? load<Words>(at) >> right : load<Words>(at) & mask); }
};

// Some pieces of R rows of the weight, from row `start` of `rows`, times M rows of input, added to `out`.
template <typename Grid, int M, int R>
void add(const Rows& rows, int64_t start, const Piece* piece, const Piece* end, const float* x, Floats (*out)[M]) {
  const Packed& packed = rows.packed;
  const Layout& layout = packed.layout;
  const int32_t* words = rows.at + start * layout.words;
  const int64_t stride = layout.words, count = packed.count;
  // Of what is read next, a share is asked for with each piece: hardware alone begins too late.
  const int64_t bytes = R * layout.stored * (int64_t)sizeof(int32_t), share = bytes / layout.pieces.size();
  const char* next = rows.next + start / R * bytes + (piece - layout.pieces.data()) * share;
  Floats sums[R][M];  // not `out`: these stay in registers
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) sums[r][m] = out[r][m];
  for (; piece < end; ++piece) {
    for (int64_t byte = 0; byte < share; byte += 64) __builtin_prefetch(next + byte);
    next += share;
    const int64_t vectors = piece->vectors * LANES;
    const int32_t* at[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) at[r] = words + piece->word + r * stride;
    if constexpr (std::is_same_v<Grid, Affine>) {
      const float* scales = rows.grids.scales.data() + piece->group * ROWS + start;
      const float* shifts = rows.grids.shifts.data() + piece->group * ROWS + start;
      const auto affine = [&](const auto codes) __attribute__((always_inline)) {
        Floats scale[R], shift[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          scale[r] = all(scales[r] * piece->unit);
          shift[r] = all(shifts[r]);
        }
        add<M, R>(sums, x, vectors, [&](int r, int64_t i) __attribute__((always_inline)) {
          return fma(codes(at[r] + i), scale[r], shift[r]);
        });
      };
      piece->top ? affine(Codes<true>(*piece)) : affine(Codes<false>(*piece));
    } else {
      const float* tables = rows.tables.data() + start * count + packed.table(*piece);
      const uint32_t right = piece->right;
      Grid table[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) table[r] = Grid(tables + r * count, packed.levels);
      add<M, R>(sums, x, vectors, [&](int r, int64_t i) __attribute__((always_inline)) {
        return table[r](load<Words>(at[r] + i) >> right);
      });
    }
    x += vectors * M;
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) out[r][m] = sums[r][m];
}

// All rows that `rows` holds, from row `first` of the weight; as many together as the registers hold, and of many rows of
// input as many columns at a time as the first cache holds.
template <typename Grid, int M>
void outputs(const Rows& rows, int64_t first, const Inputs& inputs, const float* bias, float* y) {
  constexpr int R = M == 1 ? 4 : M == 8 ? 1 : 2;
  const std::vector<Piece>& pieces = rows.packed.layout.pieces;
  const int64_t total = rows.packed.rows, count = std::min(ROWS, total - first);
  const Piece *piece = pieces.data(), *last = piece + pieces.size();
  const float* x = inputs.values.data();
  Floats out[ROWS][M] = {};
  while (piece < last) {
    const Piece* end = piece;
    int64_t vectors = 0;
    do vectors += (end++)->vectors;
    while (end < last && (M < 8 || vectors + end->vectors <= CHUNK));
    for (int64_t start = 0; start < count; start += R) add<Grid, M, R>(rows, start, piece, end, x, out + start);
    x += vectors * LANES * M;
    piece = end;
  }
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t m = 0; m < inputs.count; ++m) y[m * total + first + r] = sum(out[r][m]) + (bias ? bias[first + r] : 0.0f);
  }
}

template <typename Grid>
void floats(const Packed& packed, const std::vector<Inputs>& inputs, const float* bias, float* y) {
  const int64_t blocks = (packed.rows + ROWS - 1) / ROWS;
  at::parallel_for(0, blocks, std::max<int64_t>(1, GRAIN / (packed.layout.columns * ROWS)), [&](int64_t begin, int64_t end) {
    Rows rows(packed);
    for (int64_t first = begin * ROWS; first < end * ROWS; first += ROWS) {
      rows.read(first);
      rows.grids.shift();
      float* to = y;
      for (const Inputs& some : inputs) {
        const auto run = some.width == 1 ? outputs<Grid, 1> : some.width == 2 ? outputs<Grid, 2> : some.width == 4 ? outputs<Grid, 4> : outputs<Grid, 8>;
        run(rows, first, some, bias, to);
        to += some.count * packed.rows;
      }
    }
  });
}

// All rows of input.
void in_floats(const Packed& packed, const float* x, int64_t count, const float* bias, float* y) {
  std::vector<Inputs> inputs;
  inputs.reserve((count + 3) / 4);
  for (int64_t first = 0, some; first < count; first += some) {
    some = std::min(count - first, count - first > 6 ? INPUTS : 4);  // eight, of which two may be empty, take less than four twice
    inputs.emplace_back(x + first * packed.layout.columns, some, packed.layout);
  }
  const auto run = !packed.tables ? floats<Affine> : packed.levels <= 8 ? floats<Table<8>> : floats<Table<16>>;
  run(packed, inputs, bias, y);
}

}  // namespace
