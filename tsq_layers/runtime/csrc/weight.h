// A packed weight: words and grids as tensors, some rows of it ready to be used, and look-up tables.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "layout.h"

namespace {

constexpr int64_t ROWS = 16;  // of the weight, that are prepared together

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

  int64_t table(const Piece& piece) const { return count == levels ? 0 : piece.group * levels; }
};

// Rows of a tensor of words, behind which `more` can be read: at the tensor's end a copy. Rows that there are not are left over.
inline const int32_t* readable(const at::Tensor& tensor, int64_t row, int64_t rows, int64_t words, int64_t more, Buffer<int32_t>& copy) {
  const int32_t* from = tensor.const_data_ptr<int32_t>() + row * words;
  const int64_t left = tensor.numel() - row * words;
  if (rows * words + more <= left) return from;
  copy.resize(std::max<size_t>(copy.size(), rows * words + more));
  std::memcpy(copy.data(), from, sizeof(int32_t) * std::min(rows * words, left));
  return copy.data();
}

#if defined(__AVX2__)
// 8 × 8 words.
__attribute__((always_inline)) inline void transpose(__m256i (&rows)[LANES]) {
  __m256i pair[LANES], four[LANES];
#pragma GCC unroll 4
  for (int i = 0; i < LANES; i += 2) {
    pair[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
    pair[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < LANES; i += 4) {
    four[i] = _mm256_unpacklo_epi64(pair[i], pair[i + 2]);
    four[i + 1] = _mm256_unpackhi_epi64(pair[i], pair[i + 2]);
    four[i + 2] = _mm256_unpacklo_epi64(pair[i + 1], pair[i + 3]);
    four[i + 3] = _mm256_unpackhi_epi64(pair[i + 1], pair[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm256_permute2x128_si256(four[i], four[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2x128_si256(four[i], four[i + 4], 0x31);
  }
}
#endif

// A vector of each row, [row][lane] → [lane][row].
template <typename T>
inline void turn(const T* from, int64_t stride, T* to) {
#if defined(__AVX2__)
#pragma GCC unroll 2
  for (int64_t first = 0; first < ROWS; first += LANES) {
    __m256i values[LANES];
#pragma GCC unroll 8
    for (int r = 0; r < LANES; ++r) values[r] = load<__m256i>(from + (first + r) * stride);
    transpose(values);
#pragma GCC unroll 8
    for (int i = 0; i < LANES; ++i) store(to + i * ROWS + first, values[i]);
  }
#else
  for (int64_t r = 0; r < ROWS; ++r)
    for (int64_t i = 0; i < LANES; ++i) to[i * ROWS + r] = from[r * stride + i];
#endif
}

// Scales, and zero points or offsets, of some rows of the weight: [group][row].
struct Grids {
  const Packed& packed;
  Buffer<float> scales, zeros, shifts;  // where there are offsets, `zeros` are empty

  explicit Grids(const Packed& packed_) : packed(packed_) {
    if (packed.tables) return;
    const int64_t groups = (packed.count + LANES - 1) / LANES * LANES;
    rows.resize(ROWS * packed.count + LANES);
    scales.resize(groups * ROWS);
    shifts.resize(groups * ROWS);
    if (packed.offsets) return;
    zeros.assign(groups * ROWS, packed.levels / 2);
    codes.resize(packed.count * ROWS);
  }

  void read(int64_t first) {
    if (packed.tables) return;
    read_floats(packed.grids, first, scales.data());
    if (packed.offsets) read_floats(*packed.shifts, first, shifts.data());
    else if (packed.shifts) read_zeros(first);
  }

  // What a zero point adds to a row: −scale · zero.
  void shift() {
    for (size_t i = 0; i < zeros.size(); i += LANES) {
      store(shifts.data() + i, -load<Floats>(scales.data() + i) * load<Floats>(zeros.data() + i));
    }
  }

 private:
  Buffer<float> rows;
  Buffer<int32_t> codes, words, copy;

  void read_floats(const at::Tensor& values, int64_t first, float* to) {
    const int64_t count = packed.count, some = std::min(ROWS, packed.rows - first);
    to_float(values.const_data_ptr(), values.scalar_type(), first * count, some * count, rows.data());
    for (int64_t g = 0; g < count; g += LANES) turn(rows.data() + g, count, to + g * ROWS);
  }

  void read_zeros(int64_t first) {
    const Layout& layout = packed.zeros;
    const int32_t* from = readable(*packed.shifts, first, ROWS, layout.stored, LANES, copy);
    words.resize((layout.stored + LANES - 1) / LANES * LANES * ROWS);
    for (int64_t w = 0; w < layout.stored; w += LANES) turn(from + w, layout.stored, words.data() + w * ROWS);
    for (const Plane& plane : layout.planes) {
      const uint32_t mask = (1u << plane.bits) - 1, left = plane.shift;
      const int32_t* turned = words.data() + plane.start * ROWS;
      const bool last = &plane == &layout.planes.back();
      for (int64_t g = 0, word = 0, right = 0; g < packed.count; ++g) {
        for (int64_t r = g * ROWS, from = word * ROWS; r < (g + 1) * ROWS; r += LANES, from += LANES) {
          Words code = ((load<Words>(turned + from) >> (uint32_t)right) & mask) << left;
          if (left) code |= load<Words>(codes.data() + r);
          if (last) store(zeros.data() + r, floats(code));
          else store(codes.data() + r, code);
        }
        if (++word == plane.words) {
          word = 0;
          right += plane.bits;
        }
      }
    }
  }
};

// Some rows of the weight, ready to be used by one thread. Rows that there are not are zero or left over.
struct Rows {
  const Packed& packed;
  Grids grids;
  Buffer<int32_t> words, stored, spare;
  Buffer<float> tables;
  const int32_t* at = nullptr;  // words in the form of the layout, a row after another
  const char* next = nullptr;   // where the words of the next rows are stored

  explicit Rows(const Packed& packed_) : packed(packed_), grids(packed_) {
    const Layout& layout = packed.layout;
    if (layout.form != Form::stored) words.resize(ROWS * layout.words + LANES);
    if (layout.form == Form::words) spare.resize(layout.columns + LANES);
    if (packed.tables) tables.resize(ROWS * packed.count + LANES);
  }

  void read(int64_t first) {
    const Layout& layout = packed.layout;
    const int64_t rows = std::min(ROWS, packed.rows - first);
    next = (const char*)(packed.words.const_data_ptr<int32_t>() + (first + ROWS) * layout.stored);
    if (layout.form == Form::stored) {
      at = readable(packed.words, first, ROWS, layout.stored, LANES, stored);
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        const int32_t* row = readable(packed.words, first + r, 1, layout.stored, LANES, stored);
        int32_t* into = words.data() + r * layout.words;
        if (layout.form == Form::words) unpack(row, layout, into, spare.data());
        else layout.planes.size() == 2 ? pair<2>(row, layout, into) : pair<3>(row, layout, into);
      }
      at = words.data();
    }
    grids.read(first);
    if (packed.tables) to_float(packed.grids.const_data_ptr(), packed.grids.scalar_type(), first * packed.count, rows * packed.count, tables.data());
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

}  // namespace
