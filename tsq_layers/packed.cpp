// Packed layers on a CPU: the two operations that tsq_layers/native.py compiles and registers.
//
// A row of codes is cut into *pieces*: stretches of columns in which the place of a code in its word and the group are
// constant. Within a piece neighbouring columns are neighbouring words, so that eight codes are a load and a mask. The
// inputs are laid out once for all rows in the order of the pieces, each filled up with zeros to whole vectors; a code
// that is read behind the end of a piece meets a zero. Any number of columns and any group size are therefore the same loop.
//
//   y_n = sum over columns of  (scale · code + shift) · x,   shift = −scale · zero, or the offset
//
// A code is not even shifted: masked in its place it is code · 2^right, which a float holds exactly, and the power of
// two goes into the scale. Only one at the sign has to be.
//
// N rows of the weight, K columns, G groups a row, W words a row, M rows of input, T tables a row.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <optional>
#include <type_traits>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t LANES = 8;
constexpr int64_t ROWS = 16;          // of the weight, that are prepared together
constexpr int64_t INPUTS = 4;         // rows of input that share the decoding of a code
constexpr int64_t BLOCK = 1 << 20;    // weights that are dequantised at a time, and multiplied while in the cache
constexpr int64_t MANY_INPUTS = 256;  // with more rows of input products of larger blocks are faster
constexpr int64_t GRAIN = 1 << 16;    // weights that are worth a thread

typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(32)));

// Memory that begins with a line of the cache: a vector across two of them costs twice.
template <typename T>
struct Lines {
  typedef T value_type;
  static constexpr std::align_val_t LINE{64};
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), LINE)); }
  void deallocate(T* memory, size_t) { ::operator delete(memory, LINE); }
  bool operator==(const Lines&) const { return true; }
};

template <typename T>
using Buffer = std::vector<T, Lines<T>>;

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

inline Floats floats(Words code) { return __builtin_convertvector((Ints)code, Floats); }

inline float sum(Floats value) {
  typedef float Half __attribute__((vector_size(16)));
  const Half half = load<Half>((const float*)&value) + load<Half>((const float*)&value + LANES / 2);
  return (half[0] + half[1]) + (half[2] + half[3]);
}

// --- layout ---------------------------------------------------------------------------------------

struct Plane {
  int64_t bits, shift, words, start;  // as in packing.py
  std::vector<uint32_t> word, right;  // of each column, where a row's words are no more than a vector

  Plane(int64_t bits_, int64_t shift_, int64_t columns, int64_t start_)
      : bits(bits_), shift(shift_), words((columns * bits_ + 31) / 32), start(start_) {
    if (words > LANES) return;
    for (int64_t column = 0; column < columns + LANES; ++column) {
      word.push_back(column % words);
      right.push_back(std::min<int64_t>(column / words * bits, 31));
    }
  }
};

// A width of one plane is read as it is stored. Of the others, the codes of a row are put together before they are used:
// where K allows it in *pairs*, that is, the fields of the first plane in twice their room, those of even numbers in one
// half of the words and those of odd ones in the other, with the bits of the other planes beside them; else in a word each.
enum class Form { stored, pairs, words };

struct Piece {
  int64_t first, count, vectors, group;  // columns, of which whole vectors are read
  int64_t word;                          // where its words begin
  uint32_t right, mask;                  // the place of a code in its word
  float unit;                            // what one is, of what is multiplied
  bool top;                              // whether a code reaches the sign
};

struct Layout {
  int64_t bits, columns, groups, stored = 0, words, vectors = 0;  // stored: words a row; words: in the form that is used
  Form form;
  std::vector<Plane> planes;
  std::vector<Piece> pieces;

  Layout(int64_t bits_, int64_t group_size, int64_t columns_)
      : bits(bits_), columns(columns_), groups((columns_ + group_size - 1) / group_size) {
    int64_t shift = 0;
    for (int64_t p : {8, 4, 2, 1}) {
      if (bits & p) {
        planes.emplace_back(p, shift, columns, stored);
        stored += planes.back().words;
        shift += p;
      }
    }
    form = planes.size() == 1 ? Form::stored : columns % 32 == 0 ? Form::pairs : Form::words;
    const int64_t segment = form == Form::words ? columns : planes[0].words;  // columns in the same place of their words
    words = form == Form::pairs ? 2 * segment : segment;
    for (int64_t column = 0; column < columns;) {
      const int64_t field = column / segment, group = column / group_size;
      const int64_t end = std::min({columns, (group + 1) * group_size, (field + 1) * segment});
      Piece piece{column, end - column, (end - column + LANES - 1) / LANES, group, column - field * segment};
      if (form == Form::stored) piece.right = bits * field;
      if (form == Form::pairs) {
        piece.right = 2 * planes[0].bits * (field / 2);
        piece.word += field % 2 * segment;
      }
      piece.mask = ((1u << bits) - 1) << piece.right;
      piece.top = piece.right + bits == 32;
      piece.unit = piece.top ? 1.0f : 1.0f / (float)(1u << piece.right);
      pieces.push_back(piece);
      vectors += piece.vectors;
      column = end;
    }
  }

  // The layout of a kind of layer, made once.
  static const Layout& of(int64_t bits, int64_t group_size, int64_t columns) {
    static std::mutex mutex;
    static std::map<std::array<int64_t, 3>, Layout> known;
    const std::lock_guard<std::mutex> lock(mutex);
    return known.try_emplace({bits, group_size, columns}, bits, group_size, columns).first->second;
  }
};

// Words of up to a vector, each lane choosing one.
inline Words choose(Words from, Words index) {
#if defined(__AVX2__)
  return (Words)_mm256_permutevar8x32_epi32((__m256i)from, (__m256i)index);
#else
  Words chosen;
  for (int lane = 0; lane < LANES; ++lane) chosen[lane] = from[index[lane]];
  return chosen;
#endif
}

// The codes of a row, a word each. Up to a vector behind the last is written to `to` and `spare`.
void unpack(const int32_t* words, const Layout& layout, int32_t* to, int32_t* spare) {
  for (const Plane& plane : layout.planes) {
    int32_t* into = plane.shift ? spare : to;
    const uint32_t mask = (1u << plane.bits) - 1, shift = plane.shift;
    const int32_t* from = words + plane.start;
    if (plane.words <= LANES) {
      const Words row = load<Words>(from);
      for (int64_t i = 0; i < layout.columns; i += LANES) {
        const Words code = choose(row, load<Words>(plane.word.data() + i)) >> load<Words>(plane.right.data() + i);
        store(into + i, (code & mask) << shift);
      }
    } else {
      for (int64_t right = 0, column = 0; column < layout.columns; right += plane.bits, column += plane.words) {
        const int64_t count = std::min(plane.words, layout.columns - column);
        for (int64_t i = 0; i < count; i += LANES) {  // what is too much, the next field replaces
          store(into + column + i, ((load<Words>(from + i) >> (uint32_t)right) & mask) << shift);
        }
      }
    }
    if (!plane.shift) continue;
    for (int64_t i = 0; i < layout.columns; i += LANES) store(to + i, load<Words>(to + i) | load<Words>(spare + i));
  }
}

// The words of a row, put together in pairs. Up to a vector behind the last is written.
template <int PLANES>
void pair(const int32_t* words, const Layout& layout, int32_t* to) {
  const int64_t base = layout.planes[0].bits, length = layout.planes[PLANES - 1].words, parts = layout.planes[0].words / length;
  const uint32_t lowest = base == 2 ? 0x11111111u : 0x01010101u;
  for (int64_t odd = 0; odd < 2; ++odd) {
    for (int64_t part = 0; part < parts; ++part, to += length) {
      // Beside a field of the first plane stand several of each other plane, one after another.
      const int32_t* from[PLANES];
      uint32_t right[PLANES], shift[PLANES];
      Words mask[PLANES];
      for (int p = 0; p < PLANES; ++p) {
        const Plane& plane = layout.planes[p];
        const int64_t share = plane.words / length;
        from[p] = words + plane.start + part % share * length;
        right[p] = base * odd + plane.bits * (part / share);
        shift[p] = plane.shift;
        mask[p] = Words{} + lowest * ((1u << plane.bits) - 1);
      }
      for (int64_t j = 0; j < length; j += LANES) {  // what is too much, the next part replaces
        Words code = (load<Words>(from[0] + j) >> right[0]) & mask[0];
#pragma GCC unroll 2
        for (int p = 1; p < PLANES; ++p) code |= ((load<Words>(from[p] + j) >> right[p]) & mask[p]) << shift[p];
        store(to + j, code);
      }
    }
  }
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
#if defined(__F16C__)
    const auto eight = [](const uint16_t* from) { return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)); };
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, eight(values + i));
    if (i == count) return;
    uint16_t rest[LANES] = {};
    std::memcpy(rest, values + i, sizeof(uint16_t) * (count - i));
    const Floats last = eight(rest);
    std::memcpy(to + i, &last, sizeof(float) * (count - i));
#else
    for (int64_t i = 0; i < count; ++i) to[i] = widen(values[i]);
#endif
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

// --- the weight -----------------------------------------------------------------------------------

struct Packed {
  const Layout &layout, &zeros;
  const at::Tensor words, grids;
  const std::optional<at::Tensor> shifts;
  const int64_t rows, levels, count;  // grids a row: scales, or the levels of all tables
  const bool tables, offsets;

  Packed(
      const at::Tensor& words_, const at::Tensor& grids_, const std::optional<at::Tensor>& shifts_, int64_t bits,
      int64_t group_size, int64_t columns)
      : layout(Layout::of(bits, grids_.dim() == 3 && grids_.size(1) == 1 ? columns : group_size, columns)), zeros(Layout::of(bits, layout.groups, layout.groups)),
        words(words_.contiguous()), grids(grids_.contiguous()),
        shifts(shifts_ ? std::make_optional(shifts_->contiguous()) : std::nullopt), rows(words.size(0)),
        levels(1 << bits), count(grids.dim() == 3 ? grids.size(1) * levels : layout.groups), tables(grids.dim() == 3),
        offsets(shifts && shifts->is_floating_point()) {
    TORCH_CHECK(words.dim() == 2 && words.scalar_type() == at::kInt && words.size(1) == layout.stored, "not words of these codes");
  }

  int64_t grid(const Piece& piece) const { return !tables ? piece.group : count == levels ? 0 : piece.group * levels; }
};

// Some rows of the weight, ready to be used by one thread. Rows that there are not are zero or left over.
struct Rows {
  const Packed& packed;
  Buffer<int32_t> words, stored, zero_words, codes, spare;
  Buffer<float> grids, zeros, shifts;
  const int32_t* at = nullptr;  // words in the form of the layout, a row after another
  const char* next = nullptr;   // where the words of the next rows are stored

  explicit Rows(const Packed& packed_) : packed(packed_) {
    const Layout& layout = packed.layout;
    words.resize(ROWS * layout.words + LANES);
    grids.resize(ROWS * packed.count + LANES);
    if (layout.form != Form::stored) stored.resize(layout.stored + LANES);
    if (layout.form == Form::words) spare.resize(layout.columns + LANES);
    if (packed.tables) return;
    shifts.resize(ROWS * packed.count + LANES);
    if (packed.offsets) return;
    zeros.resize(ROWS * packed.count + LANES);
    codes.assign(layout.groups + LANES, packed.levels / 2);
    if (!packed.shifts) return;
    zero_words.resize(packed.zeros.stored + LANES);
    spare.resize(std::max<size_t>(spare.size(), layout.groups + LANES));
  }

  void read(int64_t first) {
    const Layout& layout = packed.layout;
    const int64_t rows = std::min(ROWS, packed.rows - first), start = first * packed.count, count = rows * packed.count;
    next = (const char*)(packed.words.const_data_ptr<int32_t>() + (first + ROWS) * layout.stored);
    if (layout.form == Form::stored) {
      at = safe(packed.words, first, layout.stored, ROWS, words);
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        const int32_t* row = safe(packed.words, first + r, layout.stored, 1, stored);
        int32_t* into = words.data() + r * layout.words;
        if (layout.form == Form::words) unpack(row, layout, into, spare.data());
        else layout.planes.size() == 2 ? pair<2>(row, layout, into) : pair<3>(row, layout, into);
      }
      at = words.data();
    }
    to_float(packed.grids.const_data_ptr(), packed.grids.scalar_type(), start, count, grids.data());
    if (packed.offsets) to_float(packed.shifts->const_data_ptr(), packed.shifts->scalar_type(), start, count, shifts.data());
    if (packed.offsets || packed.tables) return;
    for (int64_t r = 0; r < rows; ++r) {
      if (packed.shifts) unpack(safe(*packed.shifts, first + r, packed.zeros.stored, 1, zero_words), packed.zeros, codes.data(), spare.data());
      for (int64_t g = 0; g < packed.count; g += LANES) {  // what is too much, the next row replaces
        const int64_t i = r * packed.count + g;
        const Floats zero = floats(load<Words>(codes.data() + g));
        store(zeros.data() + i, zero);
        store(shifts.data() + i, -load<Floats>(grids.data() + i) * zero);
      }
    }
  }

  // Rows of a tensor of words, of which whole vectors can be read: at the tensor's end a copy.
  static const int32_t* safe(const at::Tensor& tensor, int64_t row, int64_t words, int64_t rows, Buffer<int32_t>& copy) {
    const int32_t* from = tensor.const_data_ptr<int32_t>() + row * words;
    const int64_t left = tensor.numel() - row * words;
    if (rows * words + LANES <= left) return from;
    std::memcpy(copy.data(), from, sizeof(int32_t) * std::min(rows * words, left));
    return copy.data();
  }
};

// table[code] for up to 8 or 16 levels; bits of an index above those of a code may be anything.
template <int64_t MOST>
struct Table {
#if defined(__AVX2__)
  Floats low, high;
  Table() = default;
  Table(const float* levels, int64_t count) {
    float wide[16];
    for (int64_t i = 0; i < 16; ++i) wide[i] = levels[i % count];
    low = load<Floats>(wide);
    high = load<Floats>(wide + 8);
  }
  inline Floats operator()(Words index) const {
    // The instruction reads three bits of an index; the fourth is moved to the sign, which chooses.
    const __m256 value = _mm256_permutevar8x32_ps((__m256)low, (__m256i)index);
    if constexpr (MOST <= 8) return (Floats)value;
    const __m256 other = _mm256_permutevar8x32_ps((__m256)high, (__m256i)index);
    return (Floats)_mm256_blendv_ps(value, other, (__m256)(index << 28));
  }
#else
  const float* levels;
  uint32_t mask;
  Table() = default;
  Table(const float* levels_, int64_t count) : levels(levels_), mask(count - 1) {}
  inline Floats operator()(Words index) const {
    Floats value;
    for (int lane = 0; lane < LANES; ++lane) value[lane] = levels[index[lane] & mask];
    return value;
  }
#endif
};

struct Affine {};

// --- few rows of input ----------------------------------------------------------------------------

// Inputs in the order of the pieces: [piece][vector][row of input][lane], zeros where a piece or the rows end.
struct Inputs {
  const int64_t count, width;  // rows of input, and how many there is room for: 1, 2 or 4
  Buffer<float> values;

  Inputs(const float* x, int64_t count_, const Layout& layout)
      : count(count_), width(count_ > 2 ? INPUTS : count_), values(layout.vectors * width * LANES) {
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
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      inputs[m] = load<Floats>(x + i * M + m * LANES);
#if defined(__AVX2__)
      asm("" : "+x"(inputs[m]));  // loaded once, not by each of the rows
#endif
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Floats weight = weights(r, i);
#pragma GCC unroll 4
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

// R rows of the weight, from row `start` of `rows`, times M rows of input.
template <typename Grid, int M, int R>
void output(const Rows& rows, int64_t start, const float* x, Floats (&out)[R][M]) {
  const Packed& packed = rows.packed;
  const Layout& layout = packed.layout;
  const int32_t* words = rows.at + start * layout.words;
  const float* grids = rows.grids.data() + start * packed.count;
  const int64_t stride = layout.words, count = packed.count;
  // Of what is read next, a share is asked for with each piece: hardware alone begins too late.
  const int64_t share = R * layout.stored * (int64_t)sizeof(int32_t) / layout.pieces.size();
  const char* next = rows.next + start * layout.stored * sizeof(int32_t);
  Floats sums[R][M] = {};  // not `out`: these stay in registers
  for (const Piece& piece : layout.pieces) {
    for (int64_t byte = 0; byte < share; byte += 64) __builtin_prefetch(next + byte);
    next += share;
    const int64_t grid = packed.grid(piece), end = piece.vectors * LANES;
    const int32_t* at[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) at[r] = words + piece.word + r * stride;
    if constexpr (std::is_same_v<Grid, Affine>) {
      const float* shifts = rows.shifts.data() + start * count;
      const auto affine = [&](const auto codes) __attribute__((always_inline)) {
        const Floats unit = all(piece.unit);
        Floats scale[R], shift[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          scale[r] = all(grids[grid + r * count]) * unit;
          shift[r] = all(shifts[grid + r * count]);
        }
        add<M, R>(sums, x, end, [&](int r, int64_t i) __attribute__((always_inline)) {
          return fma(codes(at[r] + i), scale[r], shift[r]);
        });
      };
      piece.top ? affine(Codes<true>(piece)) : affine(Codes<false>(piece));
    } else {
      const uint32_t right = piece.right;
      Grid tables[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) tables[r] = Grid(grids + grid + r * count, packed.levels);
      add<M, R>(sums, x, end, [&](int r, int64_t i) __attribute__((always_inline)) {
        return tables[r](load<Words>(at[r] + i) >> right);
      });
    }
    x += end * M;
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) out[r][m] = sums[r][m];
}

// All rows that `rows` holds, from row `first` of the weight; as many together as the registers hold.
template <typename Grid, int M>
void outputs(const Rows& rows, int64_t first, const Inputs& inputs, const float* bias, float* y) {
  constexpr int R = M == 1 ? 4 : 2;
  const int64_t total = rows.packed.rows;
  for (int64_t start = 0; start < ROWS && first + start < total; start += R) {
    Floats out[R][M];
    output<Grid, M, R>(rows, start, inputs.values.data(), out);
    for (int64_t r = 0, n = first + start; r < R && n < total; ++r, ++n) {
      for (int64_t m = 0; m < inputs.count; ++m) y[m * total + n] = sum(out[r][m]) + (bias ? bias[n] : 0.0f);
    }
  }
}

template <typename Grid>
void few(const Packed& packed, const std::vector<Inputs>& inputs, const float* bias, float* y) {
  const int64_t blocks = (packed.rows + ROWS - 1) / ROWS;
  at::parallel_for(0, blocks, std::max<int64_t>(1, GRAIN / (packed.layout.columns * ROWS)), [&](int64_t begin, int64_t end) {
    Rows rows(packed);
    for (int64_t first = begin * ROWS; first < end * ROWS; first += ROWS) {
      rows.read(first);
      float* to = y;
      for (const Inputs& some : inputs) {
        (some.width == 1 ? outputs<Grid, 1> : some.width == 2 ? outputs<Grid, 2> : outputs<Grid, 4>)(rows, first, some, bias, to);
        to += some.count * packed.rows;
      }
    }
  });
}

// --- the matrix -----------------------------------------------------------------------------------

// Rows of the weight, in the bits of tsq_layers/grid.py: product and sum are rounded to float32, then once to the type.
template <typename Grid>
void matrix(const Packed& packed, int64_t begin, int64_t end, at::ScalarType type, void* out) {
  const Layout& layout = packed.layout;
  const int64_t blocks = (end - begin + ROWS - 1) / ROWS;
  at::parallel_for(0, blocks, std::max<int64_t>(1, GRAIN / (layout.columns * ROWS)), [&](int64_t from, int64_t to) {
    Rows rows(packed);
    Buffer<float> values(layout.columns + LANES);
    for (int64_t n = begin + from * ROWS, r = 0; n < std::min(end, begin + to * ROWS); ++n, r = (r + 1) % ROWS) {
      if (r == 0) rows.read(n);
      for (const Piece& piece : layout.pieces) {
        const int32_t* at = rows.at + r * layout.words + piece.word;
        const int64_t grid = r * packed.count + packed.grid(piece), vectors = piece.vectors;
        const uint32_t right = piece.right;
        float* into = values.data() + piece.first;
        if constexpr (std::is_same_v<Grid, Affine>) {
          const uint32_t mask = (1u << layout.bits) - 1;
          const float scale = rows.grids[grid], zero = packed.offsets ? 0.0f : rows.zeros[grid];
          const float offset = packed.offsets ? rows.shifts[grid] : 0.0f;
          for (int64_t v = 0; v < vectors; ++v, into += LANES) {
            const Floats value = (floats((load<Words>(at + v * LANES) >> right) & mask) - zero) * scale;
            store(into, packed.offsets ? value + offset : value);
          }
        } else {
          const Grid table(rows.grids.data() + grid, packed.levels);
          for (int64_t v = 0; v < vectors; ++v, into += LANES) store(into, table(load<Words>(at + v * LANES) >> right));
        }
      }
      from_float(values.data(), type, (n - begin) * layout.columns, layout.columns, out);
    }
  });
}

// --- operations -----------------------------------------------------------------------------------

void dequantize_rows(const Packed& packed, int64_t begin, int64_t end, at::ScalarType type, void* out) {
  const auto run = !packed.tables ? matrix<Affine> : packed.levels <= 8 ? matrix<Table<8>> : matrix<Table<16>>;
  run(packed, begin, end, type, out);
}

at::Tensor dequantize(
    const at::Tensor& words, const at::Tensor& grids, const std::optional<at::Tensor>& shifts, int64_t bits,
    int64_t group_size, int64_t columns, at::ScalarType dtype) {
  const Packed packed(words, grids, shifts, bits, group_size, columns);
  at::Tensor out = at::empty({packed.rows, columns}, words.options().dtype(dtype));
  dequantize_rows(packed, 0, packed.rows, dtype, out.mutable_data_ptr());
  return out;
}

// Blocks of rows of the weight are made and multiplied while they are in the cache.
void many(const Packed& packed, const at::Tensor& x, at::Tensor& y) {
  const int64_t columns = packed.layout.columns, block = x.size(0) > MANY_INPUTS ? 2 * BLOCK : BLOCK;
  const int64_t step = std::max<int64_t>(64, block / columns / 16 * 16);
  at::Tensor buffer = at::empty({std::min(step, packed.rows), columns}, x.options());
  for (int64_t first = 0; first < packed.rows; first += step) {
    const int64_t count = std::min(step, packed.rows - first);
    dequantize_rows(packed, first, first + count, at::kFloat, buffer.mutable_data_ptr());
    at::Tensor part = y.narrow(1, first, count);
    at::mm_out(part, x, buffer.narrow(0, 0, count).t());
  }
}

// As float32, without gaps; what is so already costs nothing.
at::Tensor as_float(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat && tensor.is_contiguous() ? tensor : tensor.to(at::kFloat).contiguous();
}

at::Tensor linear(
    const at::Tensor& x, const at::Tensor& words, const at::Tensor& grids, const std::optional<at::Tensor>& shifts,
    const std::optional<at::Tensor>& bias, int64_t bits, int64_t group_size, int64_t columns, int64_t few_rows) {
  const Packed packed(words, grids, shifts, bits, group_size, columns);
  const at::Tensor from = as_float(x);
  const at::Tensor added = bias ? as_float(*bias) : at::Tensor();
  const int64_t total = from.numel() / columns;
  auto shape = x.sizes().vec();
  shape.back() = packed.rows;
  at::Tensor y = at::empty(shape, from.options());
  if (total > few_rows) {
    at::Tensor y_MN = y.view({total, packed.rows});
    many(packed, from.view({total, columns}), y_MN);
    if (bias) y_MN.add_(added);
  } else {
    std::vector<Inputs> inputs;
    inputs.reserve((total + INPUTS - 1) / INPUTS);
    for (int64_t first = 0; first < total; first += INPUTS) {
      inputs.emplace_back(from.const_data_ptr<float>() + first * columns, std::min(INPUTS, total - first), packed.layout);
    }
    const auto run = !packed.tables ? few<Affine> : packed.levels <= 8 ? few<Table<8>> : few<Table<16>>;
    run(packed, inputs, bias ? added.const_data_ptr<float>() : nullptr, y.mutable_data_ptr<float>());
  }
  return x.scalar_type() == at::kFloat ? y : y.to(x.scalar_type());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tsq_layers, library) {
  library.def("linear(Tensor x, Tensor words, Tensor grids, Tensor? shifts, Tensor? bias, int bits, int group_size, int columns, int few_rows) -> Tensor");
  library.def("dequantize(Tensor words, Tensor grids, Tensor? shifts, int bits, int group_size, int columns, ScalarType dtype) -> Tensor");
  library.impl("linear", c10::DispatchKey::CPU, TORCH_FN(linear));
  library.impl("dequantize", c10::DispatchKey::CPU, TORCH_FN(dequantize));
}
