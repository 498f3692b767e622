// Packed layers on a CPU: the two operations that tsq_layers/native.py compiles and registers.
//
// A row of codes is cut into *pieces*: stretches of columns in which the field of every plane (see packing.py) and
// the group are constant. Within a piece neighbouring columns are neighbouring words, so that eight codes are a load,
// a shift and a mask. The inputs are laid out once for all rows in the order of the pieces, each filled up with zeros
// to whole vectors; a code that is read behind the end of a piece meets a zero. Any number of columns and any group
// size are therefore the same loop.
//
//   y_n = sum over columns of  (scale · code + shift) · x,   shift = −scale · zero, or the offset
//
// A field is not even shifted: masked in its place it is code · 2^right, which a float holds exactly, and the power of
// two goes into the scale. Only the field at the sign has to be.
//
// N rows of the weight, K columns, G groups a row, W words a row, M rows of input, T tables a row.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t LANES = 8;
constexpr int64_t INPUTS = 4;         // rows of input that share the decoding of a code
constexpr int64_t BLOCK = 1 << 20;    // weights that are dequantised at a time, and multiplied while in the cache
constexpr int64_t MANY_INPUTS = 256;  // with more rows of input products of larger blocks are faster
constexpr int64_t GRAIN = 1 << 16;    // weights that are worth a thread

typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(32)));

enum class Kind { affine, table };

template <typename V, typename T>
inline V load(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

template <typename V, typename T>
inline void store(T* to, V value) {
  std::memcpy(to, &value, sizeof(V));
}

// a · b + c, rounded once where there is an instruction for that.
inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__FMA__) && defined(__AVX2__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

inline Floats all(float value) { return Floats{value, value, value, value, value, value, value, value}; }

// --- layout ---------------------------------------------------------------------------------------

struct Plane {
  int64_t bits, shift, words, start;  // as in packing.py
};

struct Piece {
  int64_t first, count, vectors, group;  // columns, of which whole vectors are read
  int64_t word[3];                       // where its words begin, in each plane
  uint32_t right[3];                     // by how much they are shifted
  bool top;                              // whether one of them reaches the sign
};

struct Layout {
  int64_t bits, columns, group_size, groups, words, vectors;
  std::vector<Plane> planes;
  std::vector<Piece> pieces;

  Layout(int64_t bits_, int64_t group_size_, int64_t columns_)
      : bits(bits_), columns(columns_), group_size(group_size_), groups((columns_ + group_size_ - 1) / group_size_) {
    int64_t shift = 0;
    words = vectors = 0;
    for (int64_t p : {8, 4, 2, 1}) {
      if (bits & p) {
        int64_t count = (columns * p + 31) / 32;
        // Fields, not bits, fill a word: 32 / p of them.
        planes.push_back({p, shift, count, words});
        shift += p;
        words += count;
      }
    }
    for (int64_t column = 0; column < columns;) {
      Piece piece{column, std::min(columns, (column / group_size + 1) * group_size) - column, 0, column / group_size, {}, {}, false};
      for (size_t i = 0; i < planes.size(); ++i) {
        const Plane& plane = planes[i];
        int64_t field = column / plane.words;
        piece.count = std::min(piece.count, (field + 1) * plane.words - column);
        piece.word[i] = plane.start + column - field * plane.words;
        piece.right[i] = plane.bits * field;
        piece.top |= field == 32 / plane.bits - 1;
      }
      piece.vectors = (piece.count + LANES - 1) / LANES;
      vectors += piece.vectors;
      column += piece.count;
      pieces.push_back(piece);
    }
  }
};

// Where a piece of a row begins, in each plane, and how far its fields are shifted.
struct Fields {
  const int32_t* at[3];
  uint32_t right[3];

  Fields(const int32_t* row, const Piece& piece) {
    for (int i = 0; i < 3; ++i) {
      at[i] = row + piece.word[i];
      right[i] = piece.right[i];
    }
  }
};

// Eight codes of a piece, from column i on. BITS is a constant, so that the masks are, and the planes unroll.
template <int BITS>
inline Words codes(const Fields& fields, int64_t i) {
  if constexpr (BITS == 1 || BITS == 2 || BITS == 4 || BITS == 8) {
    return (load<Words>(fields.at[0] + i) >> fields.right[0]) & ((1u << BITS) - 1);
  } else {
    constexpr int first = BITS & 4 ? 4 : 2, rest = BITS - first, second = rest & 2 ? 2 : 1;
    Words code = (load<Words>(fields.at[0] + i) >> fields.right[0]) & ((1u << first) - 1);
    code |= ((load<Words>(fields.at[1] + i) >> fields.right[1]) & ((1u << second) - 1)) << first;
    if constexpr (rest == 3) code |= ((load<Words>(fields.at[2] + i) >> fields.right[2]) & 1u) << (first + second);
    return code;
  }
}

inline Floats floats(Words code) { return __builtin_convertvector((Ints)code, Floats); }

// table[code] for up to 16 levels; bits of an index above those of a code may be anything.
template <int BITS>
struct Table {
  static constexpr uint32_t LEVELS = 1 << BITS;
#if defined(__AVX2__)
  Floats low, high;
  explicit Table(const float* levels) {
    float wide[16];
    for (uint32_t i = 0; i < 16; ++i) wide[i] = levels[i % LEVELS];
    low = load<Floats>(wide);
    high = load<Floats>(wide + 8);
  }
  inline Floats operator()(Words index) const {
    // The instruction reads three bits of an index; the fourth is moved to the sign, which chooses.
    const __m256 value = _mm256_permutevar8x32_ps((__m256)low, (__m256i)index);
    if constexpr (BITS < 4) return (Floats)value;
    const __m256 other = _mm256_permutevar8x32_ps((__m256)high, (__m256i)index);
    return (Floats)_mm256_blendv_ps(value, other, (__m256)(index << 28));
  }
#else
  const float* levels;
  explicit Table(const float* levels_) : levels(levels_) {}
  inline Floats operator()(Words index) const {
    Floats value;
    for (int lane = 0; lane < LANES; ++lane) value[lane] = levels[index[lane] % LEVELS];
    return value;
  }
#endif
};

inline float sum(Floats value) {
  float total = 0;
  for (int lane = 0; lane < LANES; ++lane) total += value[lane];
  return total;
}

// --- grids ----------------------------------------------------------------------------------------

inline float widen(uint16_t half) {  // float16, exactly, subnormal or not
  uint32_t bits = (uint32_t)(half & 0x7fff) << 13;
  float value, scale = 0x1p112f;
  std::memcpy(&value, &bits, 4);
  value *= scale;
  std::memcpy(&bits, &value, 4);
  bits |= (half & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  bits |= (uint32_t)(half & 0x8000) << 16;
  std::memcpy(&value, &bits, 4);
  return value;
}

void to_float(const void* from, at::ScalarType type, int64_t first, int64_t count, float* to) {
  if (type == at::kFloat) {
    std::memcpy(to, (const float*)from + first, sizeof(float) * count);
  } else if (type == at::kBFloat16) {
    const uint16_t* values = (const uint16_t*)from + first;
    for (int64_t i = 0; i < count; ++i) {
      uint32_t bits = (uint32_t)values[i] << 16;
      std::memcpy(to + i, &bits, 4);
    }
  } else {
    const uint16_t* values = (const uint16_t*)from + first;
    for (int64_t i = 0; i < count; ++i) to[i] = widen(values[i]);
  }
}

void from_float(const float* from, at::ScalarType type, int64_t first, int64_t count, void* to) {
  if (type == at::kFloat) {
    std::memcpy((float*)to + first, from, sizeof(float) * count);
  } else if (type == at::kBFloat16) {
    uint16_t* values = (uint16_t*)to + first;
    for (int64_t i = 0; i < count; ++i) {
      uint32_t bits;
      std::memcpy(&bits, from + i, 4);
      uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
      values[i] = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
    }
  } else {
    at::Half* values = (at::Half*)to + first;
    for (int64_t i = 0; i < count; ++i) values[i] = from[i];
  }
}

// The packed weight, and what a thread needs of one row of it.
struct Packed {
  const Layout& layout;
  Layout zeros;
  const at::Tensor &words, &grids;
  const std::optional<at::Tensor>& shifts;
  int64_t rows, tables, levels;
  bool offsets;

  Packed(const Layout& layout_, const at::Tensor& words_, const at::Tensor& grids_, const std::optional<at::Tensor>& shifts_)
      : layout(layout_), zeros(layout_.bits, layout_.groups, layout_.groups), words(words_), grids(grids_), shifts(shifts_),
        rows(words_.size(0)), tables(grids_.dim() == 3 ? grids_.size(1) : 0), levels(1 << layout_.bits),
        offsets(shifts_ && shifts_->is_floating_point()) {}
};

struct Row {
  std::vector<int32_t> words, zero_words;  // of a row at the tensor's end: a vector must not read behind it
  std::vector<float> scales, shifts, zeros;
  const int32_t* at = nullptr;

  explicit Row(const Packed& packed)
      : words(packed.layout.words + LANES), zero_words(packed.zeros.words + LANES),
        scales((packed.tables ? packed.tables * packed.levels : packed.layout.groups) + LANES),
        shifts(packed.layout.groups + 2 * LANES), zeros(packed.layout.groups + 2 * LANES) {}

  static const int32_t* safe(const at::Tensor& tensor, int64_t row, int64_t count, std::vector<int32_t>& copy) {
    const int32_t* from = tensor.const_data_ptr<int32_t>() + row * count;
    if ((row + 1) * count + LANES <= tensor.numel()) return from;
    std::memcpy(copy.data(), from, sizeof(int32_t) * count);
    return copy.data();
  }

  template <int BITS>
  void read(const Packed& packed, int64_t row) {
    at = safe(packed.words, row, packed.layout.words, words);
    int64_t count = packed.tables ? packed.tables * packed.levels : packed.layout.groups;
    to_float(packed.grids.const_data_ptr(), packed.grids.scalar_type(), row * count, count, scales.data());
    if (packed.tables) return;
    if (packed.offsets) {
      to_float(packed.shifts->const_data_ptr(), packed.shifts->scalar_type(), row * count, count, shifts.data());
    } else if (packed.shifts) {
      const int32_t* from = safe(*packed.shifts, row, packed.zeros.words, zero_words);
      for (const Piece& piece : packed.zeros.pieces) {
        const Fields fields(from, piece);
        for (int64_t v = 0; v < piece.vectors; ++v) {  // what is stored behind a piece, the next one overwrites
          store(zeros.data() + piece.first + v * LANES, floats(codes<BITS>(fields, v * LANES)));
        }
      }
    } else {
      std::fill(zeros.begin(), zeros.end(), (float)(packed.levels / 2));
    }
    if (!packed.offsets)
      for (int64_t g = 0; g < count; ++g) shifts[g] = -scales[g] * zeros[g];
  }
};

// --- few rows of input ----------------------------------------------------------------------------

// Inputs in the order of the pieces: [piece][vector][row of input][lane], zeros where a piece or the rows end.
struct Inputs {
  std::vector<float> values;

  // M is 1, 2 or 4; rows that there are not are zero.
  Inputs(const float* x, int64_t count, int64_t M, const Layout& layout) : values(layout.vectors * M * LANES) {
    float* to = values.data();
    for (const Piece& piece : layout.pieces) {
      for (int64_t v = 0; v < piece.vectors; ++v, to += M * LANES) {
        const int64_t column = piece.first + v * LANES, filled = std::min(LANES, piece.count - v * LANES);
        for (int64_t m = 0; m < count; ++m) std::memcpy(to + m * LANES, x + m * layout.columns + column, sizeof(float) * filled);
      }
    }
  }
};

// The codes of a piece as floats, times a power of two: masks and factors of the planes.
template <int BITS, bool TOP>
struct Decoder {
  static constexpr bool SHIFTED = TOP;
  static constexpr int FIRST = BITS & 8 ? 8 : BITS & 4 ? 4 : BITS & 2 ? 2 : 1;
  static constexpr int SECOND = (BITS - FIRST) & 2 ? 2 : (BITS - FIRST) & 1, THIRD = BITS - FIRST - SECOND;
  Words mask[3];
  float factor[3];
  float unit;  // of what comes out

  explicit Decoder(const Piece& piece) {
    const int bits[3] = {FIRST, SECOND, THIRD}, place[3] = {0, FIRST, FIRST + SECOND};
    unit = power(-(int)piece.right[0]);
    for (int i = 0; i < 3; ++i) {
      mask[i] = Words{} + (((1u << bits[i]) - 1) << piece.right[i]);
      factor[i] = power(place[i] + (int)piece.right[0] - (int)piece.right[i]);
    }
    if (SHIFTED) unit = 1;
  }

  static float power(int exponent) {
    const uint32_t bits = (uint32_t)(127 + exponent) << 23;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }

  inline Floats operator()(const Fields& fields, int64_t i) const {
    if constexpr (SHIFTED) {
      return floats(codes<BITS>(fields, i));
    } else {
      Floats code = floats(load<Words>(fields.at[0] + i) & mask[0]);
      if constexpr (SECOND > 0) code = fma(floats(load<Words>(fields.at[1] + i) & mask[1]), all(factor[1]), code);
      if constexpr (THIRD > 0) code = fma(floats(load<Words>(fields.at[2] + i) & mask[2]), all(factor[2]), code);
      return code;
    }
  }
};

template <int M, int R>
struct Sums {
  Floats of[R][M] = {};
};

// One piece of R rows of the weight, times M rows of input.
template <int M, int R, typename Weights>
inline void add(Sums<M, R>& total, const float* x, int64_t end, const Weights& weights) {
  Sums<M, R> sums = total;
  int64_t i = 0;
  if constexpr (M == 1 && R == 2) {  // two vectors at a time, so that sums do not wait for one another
    Sums<M, R> others;
    for (; i + LANES < end; i += 2 * LANES) {
      Floats one = load<Floats>(x + i), two = load<Floats>(x + i + LANES);
#if defined(__AVX2__)
      asm("" : "+x"(one), "+x"(two));  // loaded once, not by each of the rows
#endif
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        sums.of[r][0] = fma(weights(r, i), one, sums.of[r][0]);
        others.of[r][0] = fma(weights(r, i + LANES), two, others.of[r][0]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sums.of[r][0] += others.of[r][0];
  }
  for (; i < end; i += LANES) {
    Floats inputs[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      inputs[m] = load<Floats>(x + i * M + m * LANES);
#if defined(__AVX2__)
      if constexpr (M == 1) asm("" : "+x"(inputs[m]));
#endif
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Floats weight = weights(r, i);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sums.of[r][m] = fma(weight, inputs[m], sums.of[r][m]);
    }
  }
  total = sums;
}

template <int BITS, bool TOP, int M, int R, int... r>
inline void affine(
    Sums<M, R>& total, const Row* const* rows, const Piece& piece, const float* x, std::integer_sequence<int, r...>) {
  const Decoder<BITS, TOP> decoder(piece);
  const Fields fields[R] = {Fields(rows[r]->at, piece)...};
  const Floats scales[R] = {all(rows[r]->scales[piece.group] * decoder.unit)...};
  const Floats shifts[R] = {all(rows[r]->shifts[piece.group])...};
  add<M, R>(total, x, piece.vectors * LANES, [&](int n, int64_t i) __attribute__((always_inline)) {
    return fma(decoder(fields[n], i), scales[n], shifts[n]);
  });
}

template <int BITS, int M, int R, int... r>
inline void table(
    Sums<M, R>& total, const Row* const* rows, const Piece& piece, int64_t first, const float* x,
    std::integer_sequence<int, r...>) {
  const Fields fields[R] = {Fields(rows[r]->at, piece)...};
  const Table<BITS> tables[R] = {Table<BITS>(rows[r]->scales.data() + first)...};
  add<M, R>(total, x, piece.vectors * LANES, [&](int n, int64_t i) __attribute__((always_inline)) {
    return tables[n](codes<BITS>(fields[n], i));
  });
}

// How many rows of the weight go together: as many as the registers hold.
template <int BITS, Kind KIND, int M>
constexpr int together() {
  constexpr bool single = BITS == 1 || BITS == 2 || BITS == 4 || BITS == 8;
  return M == 1 && single && (KIND == Kind::affine || BITS < 4) ? 4 : 2;
}

template <int BITS, Kind KIND, int M>
void output(
    const Packed& packed, const std::vector<Row>& of, const Inputs& inputs, int64_t first, int64_t inputs_count,
    const float* bias, float* y) {
  constexpr int R = together<BITS, KIND, M>();
  constexpr auto each = std::make_integer_sequence<int, R>();
  const Layout& layout = packed.layout;
  for (int64_t start = 0; start < (int64_t)of.size() && first + start < packed.rows; start += R) {
    const int64_t count = std::min<int64_t>(R, packed.rows - first - start);
    const Row* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = &of[start + std::min<int64_t>(r, count - 1)];
    Sums<M, R> total;
    const float* x = inputs.values.data();
    const char* next = (const char*)(rows[0]->at + R * layout.words);  // what will be read next, if rows lie in order
    const int64_t step = R * layout.words * (int64_t)sizeof(int32_t) / layout.pieces.size();
    for (const Piece& piece : layout.pieces) {
      for (int64_t byte = 0; byte < step; byte += 64) __builtin_prefetch(next + byte);
      next += step;
      if constexpr (KIND == Kind::table) {
        table<BITS, M, R>(total, rows, piece, packed.tables == 1 ? 0 : piece.group * packed.levels, x, each);
      } else if (piece.top) {
        affine<BITS, true, M, R>(total, rows, piece, x, each);
      } else {
        affine<BITS, false, M, R>(total, rows, piece, x, each);
      }
      x += piece.vectors * LANES * M;
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t n = first + start + r;
      for (int64_t m = 0; m < inputs_count; ++m) y[m * packed.rows + n] = sum(total.of[r][m]) + (bias ? bias[n] : 0.0f);
    }
  }
}

constexpr int64_t ROWS = 4;  // a multiple of all together()

template <int BITS, Kind KIND>
void few(const Packed& packed, const std::vector<Inputs>& inputs, int64_t inputs_total, const float* bias, float* y) {
  const int64_t blocks = (packed.rows + ROWS - 1) / ROWS;
  at::parallel_for(0, blocks, std::max<int64_t>(1, GRAIN / (packed.layout.columns * ROWS)), [&](int64_t begin, int64_t end) {
    std::vector<Row> rows(ROWS, Row(packed));
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * ROWS;
      for (int64_t r = 0; r < ROWS && first + r < packed.rows; ++r) rows[r].template read<BITS>(packed, first + r);
      for (size_t i = 0; i < inputs.size(); ++i) {
        const int64_t count = std::min<int64_t>(INPUTS, inputs_total - i * INPUTS);
        const auto run = count == 1 ? output<BITS, KIND, 1> : count == 2 ? output<BITS, KIND, 2> : output<BITS, KIND, 4>;
        run(packed, rows, inputs[i], first, count, bias, y + i * INPUTS * packed.rows);
      }
    }
  });
}

// --- the matrix -----------------------------------------------------------------------------------

// Rows of the weight, in the bits of tsq_layers/grid.py: product and sum are rounded to float32, then once to the type.
template <int BITS, Kind KIND>
void matrix(const Packed& packed, int64_t begin, int64_t end, at::ScalarType type, void* out) {
  const Layout& layout = packed.layout;
  at::parallel_for(begin, end, std::max<int64_t>(1, GRAIN / layout.columns), [&](int64_t from, int64_t to) {
    Row row(packed);
    std::vector<float> values(layout.columns + LANES);
    for (int64_t n = from; n < to; ++n) {
      row.read<BITS>(packed, n);
      for (const Piece& piece : layout.pieces) {
        const Fields fields(row.at, piece);
        float* into = values.data() + piece.first;
        if constexpr (KIND == Kind::affine) {
          const float scale = row.scales[piece.group];
          const float zero = packed.offsets ? 0.0f : row.zeros[piece.group];
          const float offset = packed.offsets ? row.shifts[piece.group] : 0.0f;
          for (int64_t v = 0; v < piece.vectors; ++v, into += LANES) {
            const Floats value = (floats(codes<BITS>(fields, v * LANES)) - zero) * scale;
            store(into, packed.offsets ? value + offset : value);
          }
        } else {
          const Table<BITS> table(row.scales.data() + (packed.tables == 1 ? 0 : piece.group * packed.levels));
          for (int64_t v = 0; v < piece.vectors; ++v, into += LANES) {
            store(into, table(codes<BITS>(fields, v * LANES)));
          }
        }
      }
      from_float(values.data(), type, (n - begin) * layout.columns, layout.columns, out);
    }
  });
}

// --- operations -----------------------------------------------------------------------------------

template <typename F>
void dispatch(const Packed& packed, F&& run) {
#define CASE(B, KIND) run(std::integral_constant<int, B>{}, std::integral_constant<Kind, KIND>{})
  if (packed.tables) {
    switch (packed.layout.bits) {
      case 1: return CASE(1, Kind::table);
      case 2: return CASE(2, Kind::table);
      case 3: return CASE(3, Kind::table);
      default: return CASE(4, Kind::table);
    }
  }
  switch (packed.layout.bits) {
    case 1: return CASE(1, Kind::affine);
    case 2: return CASE(2, Kind::affine);
    case 3: return CASE(3, Kind::affine);
    case 4: return CASE(4, Kind::affine);
    case 5: return CASE(5, Kind::affine);
    case 6: return CASE(6, Kind::affine);
    case 7: return CASE(7, Kind::affine);
    default: return CASE(8, Kind::affine);
  }
#undef CASE
}

at::Tensor dequantize(
    const at::Tensor& words, const at::Tensor& grids, const std::optional<at::Tensor>& shifts, int64_t bits,
    int64_t group_size, int64_t columns, at::ScalarType dtype) {
  const Layout layout(bits, group_size, columns);
  const at::Tensor words_ = words.contiguous(), grids_ = grids.contiguous();
  const std::optional<at::Tensor> shifts_ = shifts ? std::make_optional(shifts->contiguous()) : std::nullopt;
  const Packed packed(layout, words_, grids_, shifts_);
  at::Tensor out = at::empty({packed.rows, columns}, words.options().dtype(dtype));
  dispatch(packed, [&](auto B, auto KIND) { matrix<B.value, KIND.value>(packed, 0, packed.rows, dtype, out.mutable_data_ptr()); });
  return out;
}

// Blocks of rows of the weight are made and multiplied while they are in the cache.
void many(const Packed& packed, const at::Tensor& x, at::Tensor& y) {
  const int64_t columns = packed.layout.columns, step = std::max<int64_t>(64, (x.size(0) > MANY_INPUTS ? 2 * BLOCK : BLOCK) / columns / 16 * 16);
  at::Tensor buffer = at::empty({std::min(step, packed.rows), columns}, x.options());
  for (int64_t first = 0; first < packed.rows; first += step) {
    const int64_t count = std::min(step, packed.rows - first);
    dispatch(packed, [&](auto B, auto KIND) {
      matrix<B.value, KIND.value>(packed, first, first + count, at::kFloat, buffer.mutable_data_ptr());
    });
    at::Tensor part = y.narrow(1, first, count);
    at::mm_out(part, x, buffer.narrow(0, 0, count).t());
  }
}

at::Tensor linear(
    const at::Tensor& x, const at::Tensor& words, const at::Tensor& grids, const std::optional<at::Tensor>& shifts,
    const std::optional<at::Tensor>& bias, int64_t bits, int64_t group_size, int64_t columns, int64_t few_rows) {
  const Layout layout(bits, group_size, columns);
  const at::Tensor words_ = words.contiguous(), grids_ = grids.contiguous();
  const std::optional<at::Tensor> shifts_ = shifts ? std::make_optional(shifts->contiguous()) : std::nullopt;
  const Packed packed(layout, words_, grids_, shifts_);
  const at::Tensor x_MK = x.reshape({-1, columns}).to(at::kFloat).contiguous();
  const std::optional<at::Tensor> bias_ = bias ? std::make_optional(bias->to(at::kFloat).contiguous()) : std::nullopt;
  const int64_t inputs_total = x_MK.size(0);
  at::Tensor y = at::empty({inputs_total, packed.rows}, x_MK.options());
  if (inputs_total > few_rows) {
    many(packed, x_MK, y);
    if (bias_) y.add_(*bias_);
  } else {
    std::vector<Inputs> inputs;
    for (int64_t first = 0; first < inputs_total; first += INPUTS) {
      const int64_t count = std::min(INPUTS, inputs_total - first);
      inputs.emplace_back(x_MK.const_data_ptr<float>() + first * columns, count, count > 2 ? INPUTS : count, layout);
    }
    const float* added = bias_ ? bias_->const_data_ptr<float>() : nullptr;
    dispatch(packed, [&](auto B, auto KIND) {
      few<B.value, KIND.value>(packed, inputs, inputs_total, added, y.mutable_data_ptr<float>());
    });
  }
  auto shape = x.sizes().vec();
  shape.back() = packed.rows;
  return y.to(x.scalar_type()).view(shape);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tsq_layers, library) {
  library.def("linear(Tensor x, Tensor words, Tensor grids, Tensor? shifts, Tensor? bias, int bits, int group_size, int columns, int few_rows) -> Tensor");
  library.def("dequantize(Tensor words, Tensor grids, Tensor? shifts, int bits, int group_size, int columns, ScalarType dtype) -> Tensor");
  library.impl("linear", c10::DispatchKey::CPU, TORCH_FN(linear));
  library.impl("dequantize", c10::DispatchKey::CPU, TORCH_FN(dequantize));
}
