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

}  // namespace
