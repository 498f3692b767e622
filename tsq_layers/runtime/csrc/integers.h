// One row of input, in integers.
//
// The inputs of a piece are whole numbers of a *unit*, a power of two, and such a number is three signed bytes: its digits
// to the base 256. What is below half a unit, 2^-23 of the largest input of the piece or less, is rounded away, as sums of
// floats do as well. Codes are bytes, so that 32 products of a code and a digit are one instruction; sums of them are exact,
// and the zero point times the sum of the inputs is taken from them before anything is rounded.
//
//   y_n = sum over pieces of  scale · unit · (sum of code · number − zero · sum of numbers)
//
// Rows of the weight are turned for that: a vector holds, of each of eight rows, the same byte of four neighbouring words
// (a *quad*), which is, once masked, the codes of four neighbouring columns. That is done for a *tile* at a time, a stretch of
// words that fits the first cache, and the pieces are cut where tiles end.
#pragma once

#include "floats.h"

#if defined(__AVX2__)

namespace {

constexpr int64_t QUAD = 4;    // words, or columns
constexpr int64_t TILE = 128;  // words of a row, and so the columns of a stretch, whose sums 32 bits hold
constexpr int HALVES = ROWS / LANES;
constexpr int DIGITS = 3;              // of a number
constexpr int TOP = 8 * (DIGITS - 1);  // the place of the highest

// --- the order of the work ------------------------------------------------------------------------

// What a tile has of a piece.
struct Stretch {
  int64_t first, count, quads, group;  // columns
  int64_t at;                          // of the first byte in a turned tile
  int32_t right;                       // the place of a code in its byte
};

struct Tile {
  int64_t word, words;  // of the first plane, of each row
  int64_t stretches;    // how many
};

struct Tiles {
  static constexpr int64_t AREA = (TILE + LANES) * ROWS * sizeof(int32_t);  // bytes of a turned tile

  std::vector<Tile> tiles;
  std::vector<Stretch> stretches;  // tile by tile
  int64_t quads = 0;
  bool fit;  // whether codes are small enough, and pieces begin with a quad

  explicit Tiles(const Layout& layout) : fit(layout.bits <= 4 && layout.form != Form::words) {
    const int64_t segment = layout.planes[0].words;
    for (const Piece& piece : layout.pieces) fit &= piece.word % segment % QUAD == 0;
    for (int64_t word = 0; fit && word < segment; word += TILE) {
      const int64_t end = std::min(segment, word + TILE), before = stretches.size();
      for (const Piece& piece : layout.pieces) {
        const int64_t begins = piece.word % segment, from = std::max(word, begins), to = std::min(end, begins + piece.count);
        if (from >= to) continue;
        const int64_t count = (to - from + QUAD - 1) / QUAD, byte = piece.right / 8;
        const int64_t at = piece.word / segment * AREA + ((from - word) * (int64_t)sizeof(int32_t) + byte * QUAD) * ROWS;
        stretches.push_back({piece.first + from - begins, to - from, count, piece.group, at, (int32_t)piece.right % 8});
        quads += count;
      }
      tiles.push_back({word, end - word, (int64_t)stretches.size() - before});
    }
  }

  // Those of a layout, made once; layouts are kept.
  static const Tiles& of(const Layout& layout) {
    static std::mutex mutex;
    static std::map<const Layout*, Tiles> known;
    const std::lock_guard<std::mutex> lock(mutex);
    return known.try_emplace(&layout, layout).first->second;
  }
};

// --- inputs ---------------------------------------------------------------------------------------

inline __m256 eight(const float* x, int64_t left) {
  if (left >= LANES) return _mm256_loadu_ps(x);
  float some[LANES] = {};
  std::memcpy(some, x, sizeof(float) * left);
  return _mm256_loadu_ps(some);
}

inline int32_t sum(__m256i value) {
  const __m128i half = _mm_add_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
  const __m128i pair = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(pair) + _mm_extract_epi32(pair, 1);
}

struct Numbers {
  struct Of {
    float unit;
    int32_t high, low;  // the sum of the numbers is high · 2^16 + low
  };
  Buffer<int32_t> quads;  // [stretch][quad][digit]: four bytes, the lowest digit first
  std::vector<Of> stretches;
  bool usable = true;  // whether all inputs are finite, and the units are not too small for a float

  Numbers(const float* x, const Tiles& tiles) : quads(tiles.quads * DIGITS + 2 * DIGITS) {
    stretches.reserve(tiles.stretches.size());
    int32_t* to = quads.data();
    for (const Stretch& stretch : tiles.stretches) {
      usable = usable && add(x + stretch.first, stretch.count, to);
      to += stretch.quads * DIGITS;
    }
  }

 private:
  bool add(const float* x, int64_t count, int32_t* to) {
    __m256i largest = _mm256_setzero_si256();
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    for (int64_t i = 0; i < count; i += LANES) {
      largest = _mm256_max_epi32(largest, _mm256_and_si256(_mm256_castps_si256(eight(x + i, count - i)), magnitude));
    }
    int32_t each[LANES], most = 0;
    store(each, largest);
    for (int32_t one : each) most = std::max(most, one);
    // The least power of two of which the largest input is less than 127/128; the bits of floats are in their order.
    const int32_t exponent = (most >> 23) + ((most & 0x7fffff) >= 0x7e0000);
    if (exponent >= 255 || (most != 0 && exponent < 64)) return false;
    const int32_t unit = std::max(exponent + 1 - TOP - 7, 1) << 23, inverse = (254 << 23) - unit;
    Of of;
    float numbers;
    std::memcpy(&of.unit, &unit, sizeof(float));
    std::memcpy(&numbers, &inverse, sizeof(float));
    __m256i high = _mm256_setzero_si256(), low = _mm256_setzero_si256();
    for (int64_t i = 0; i < count; i += LANES, to += 2 * DIGITS) {
      const __m256i number = _mm256_cvtps_epi32(_mm256_mul_ps(eight(x + i, count - i), _mm256_set1_ps(numbers)));
      // A digit below the highest that is half of the base or more becomes negative, and the next one more.
      const __m256i halves = _mm256_set1_epi32(0x8080);
      const __m256i carried = _mm256_add_epi32(number, halves), digits = _mm256_xor_si256(carried, halves);
      const __m256i top = _mm256_srai_epi32(carried, TOP);
      high = _mm256_add_epi32(high, top);
      low = _mm256_add_epi32(low, _mm256_sub_epi32(number, _mm256_slli_epi32(top, TOP)));
#pragma GCC unroll 3
      for (int d = 0; d < DIGITS; ++d) {  // the second quad may be behind the piece, and is then replaced
        to[d] = bytes(digits, d, 0);
        to[DIGITS + d] = bytes(digits, d, 1);
      }
    }
    of.high = sum(high);
    of.low = sum(low);
    stretches.push_back(of);
    return true;
  }

  // Byte d of four of the words.
  static int32_t bytes(__m256i words, int d, int half) {
    const __m128i four = half ? _mm256_extracti128_si256(words, 1) : _mm256_castsi256_si128(words);
    return _mm_cvtsi128_si32(_mm_shuffle_epi8(four, _mm_add_epi8(_mm_set1_epi32(0x0c080400), _mm_set1_epi8(d))));
  }
};

// --- the weight -----------------------------------------------------------------------------------

// Words of some rows of the weight, turned, a tile at a time.
struct Turned {
  const Packed& packed;
  Buffer<uint8_t> bytes;       // [quad][byte of a word][row][word of the quad], for pairs twice
  const char* next = nullptr;  // where the words of the next rows are stored

  explicit Turned(const Packed& packed_) : packed(packed_), bytes((packed.layout.form == Form::pairs ? 2 : 1) * Tiles::AREA) {}

  void start(int64_t first) {
    const Layout& layout = packed.layout;
    at = readable(packed.words, first, ROWS, layout.stored, layout.words + LANES, copy);
    next = (const char*)(packed.words.const_data_ptr<int32_t>() + (first + ROWS) * layout.stored);
  }

  void read(const Tile& tile) {
    if (packed.layout.form == Form::pairs) turn_pairs(tile);
    else turn_bytes(tile);
  }

 private:
  Buffer<int32_t> copy;
  const int32_t* at = nullptr;  // the words, row by row

  // The same byte of each word of a quad, side by side.
  static __m256i same_bytes(__m256i words) {
    return _mm256_shuffle_epi8(words, _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
  }

  void turn_bytes(const Tile& tile) {
    const int64_t stride = packed.layout.stored;
    for (int64_t word = 0; word < tile.words; word += LANES) {
      __m256i* to = (__m256i*)bytes.data() + word * HALVES;
#pragma GCC unroll 2
      for (int half = 0; half < HALVES; ++half) {
        __m256i values[LANES];
#pragma GCC unroll 8
        for (int r = 0; r < LANES; ++r) values[r] = same_bytes(load<__m256i>(at + tile.word + word + (half * LANES + r) * stride));
        transpose(values);
#pragma GCC unroll 8
        for (int i = 0; i < LANES; ++i) _mm256_store_si256(to + i * HALVES + half, values[i]);
      }
    }
  }

  // Codes of three bits. A field of two bits has in the plane of single bits twice as many for half as many words: in the same
  // byte, the bits at its place for the words of the first half, those after them for the second. Four bits of what is
  // made are a code, fields of even numbers in the first area and those of odd ones in the second.
  void turn_pairs(const Tile& tile) {
    const int64_t stride = packed.layout.stored, single = packed.layout.planes[1].words;
    const int32_t* singles = at + packed.layout.planes[1].start;
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), field = _mm256_set1_epi8(0x33);
    for (int64_t word = 0; word < tile.words; word += LANES) {
      const int64_t place = tile.word + word;
      const __m256i first_half = _mm256_cmpgt_epi32(_mm256_set1_epi32(single - place), lanes);
      __m256i *even = (__m256i*)bytes.data() + word * HALVES, *odd = (__m256i*)(bytes.data() + Tiles::AREA) + word * HALVES;
#pragma GCC unroll 2
      for (int half = 0; half < HALVES; ++half) {
        __m256i two[LANES], one[LANES];
#pragma GCC unroll 8
        for (int r = 0; r < LANES; ++r) two[r] = same_bytes(load<__m256i>(at + place + (half * LANES + r) * stride));
        transpose(two);
#pragma GCC unroll 8
        for (int i = 0; i < LANES; ++i) _mm256_store_si256(even + i * HALVES + half, two[i]);
#pragma GCC unroll 8
        for (int r = 0; r < LANES; ++r) {
          const int32_t* row = singles + place + (half * LANES + r) * stride;
          const __m256i moved = _mm256_srli_epi32(load<__m256i>(row - single), 1);
          one[r] = same_bytes(_mm256_blendv_epi8(moved, load<__m256i>(row), first_half));
        }
        transpose(one);
#pragma GCC unroll 8
        for (int i = 0; i < LANES; ++i) {
          const __m256i low = _mm256_load_si256(even + i * HALVES + half);
          const __m256i bit = _mm256_slli_epi16(_mm256_and_si256(one[i], _mm256_set1_epi8(0x11)), 2);
          _mm256_store_si256(even + i * HALVES + half, _mm256_or_si256(_mm256_and_si256(low, field), bit));
          const __m256i other = _mm256_and_si256(_mm256_srli_epi16(low, 2), field);
          _mm256_store_si256(odd + i * HALVES + half, _mm256_or_si256(other, _mm256_and_si256(one[i], _mm256_set1_epi8(0x44))));
        }
      }
    }
  }
};

// --- the product ----------------------------------------------------------------------------------

// Sums of code · digit over some quads, added to `total`; SHIFTED: the codes are not at the lowest bits of their bytes.
template <bool SHIFTED>
__attribute__((always_inline)) inline void multiply(
    __m256i (&total)[HALVES][DIGITS], const uint8_t* at, const int32_t* digits, int64_t quads, int64_t most, __m256i mask, __m128i right) {
  for (; quads > 0; quads -= most) {
    __m256i some[HALVES][DIGITS] = {};
    for (int64_t q = std::min(quads, most); q > 0; --q) {
#pragma GCC unroll 2
      for (int half = 0; half < HALVES; ++half) {
        __m256i code = _mm256_load_si256((const __m256i*)at + half);
        if constexpr (SHIFTED) code = _mm256_srl_epi16(code, right);
        code = _mm256_and_si256(code, mask);
#pragma GCC unroll 3
        for (int d = 0; d < DIGITS; ++d) {
          some[half][d] = _mm256_add_epi16(some[half][d], _mm256_maddubs_epi16(code, _mm256_set1_epi32(digits[d])));
        }
      }
      digits += DIGITS;
      at += QUAD * ROWS * sizeof(int32_t);
    }
#pragma GCC unroll 2
    for (int half = 0; half < HALVES; ++half) {
#pragma GCC unroll 3
      for (int d = 0; d < DIGITS; ++d) {
        total[half][d] = _mm256_add_epi32(total[half][d], _mm256_madd_epi16(some[half][d], _mm256_set1_epi16(1)));
      }
    }
  }
}

// high · 2^16 + low.
inline __m256 number(__m256i high, __m256i low) {
  const __m256 base = _mm256_set1_ps(1 << TOP);
  return (__m256)fma((Floats)_mm256_cvtepi32_ps(high), (Floats)base, (Floats)_mm256_cvtepi32_ps(low));
}

// The outputs of the rows that are turned.
template <bool OFFSETS>
void outputs(Turned& turned, const Grids& grids, const Tiles& tiles, const Numbers& x, __m256 (&sums)[HALVES]) {
  const Layout& layout = turned.packed.layout;
  const __m256i mask = _mm256_set1_epi8((1 << layout.bits) - 1);
  const int64_t most = 32767 / (2 * 128 * ((1 << layout.bits) - 1));  // quads whose sums 16 bits hold
  const int64_t share = ROWS * layout.stored * (int64_t)sizeof(int32_t) / tiles.stretches.size();
  const char* next = turned.next;
  const int32_t* digits = x.quads.data();
  const Stretch* stretch = tiles.stretches.data();
  const auto* of = x.stretches.data();
  for (const Tile& tile : tiles.tiles) {
    turned.read(tile);
    for (const Stretch* end = stretch + tile.stretches; stretch < end; ++stretch, ++of) {
      for (int64_t byte = 0; byte < share; byte += 64) __builtin_prefetch(next + byte);
      next += share;
      const uint8_t* at = turned.bytes.data() + stretch->at;
      __m256i total[HALVES][DIGITS] = {};
      if (stretch->right == 0) multiply<false>(total, at, digits, stretch->quads, most, mask, __m128i{});
      else multiply<true>(total, at, digits, stretch->quads, most, mask, _mm_cvtsi32_si128(stretch->right));
      digits += stretch->quads * DIGITS;
      const __m256i all_high = _mm256_set1_epi32(of->high), all_low = _mm256_set1_epi32(of->low);
      const __m256 unit = _mm256_set1_ps(of->unit);
#pragma GCC unroll 2
      for (int half = 0; half < HALVES; ++half) {
        const int64_t g = stretch->group * ROWS + half * LANES;
        __m256i high = total[half][2], low = _mm256_add_epi32(_mm256_slli_epi32(total[half][1], 8), total[half][0]);
        if constexpr (!OFFSETS) {
          const __m256i zero = _mm256_cvtps_epi32(_mm256_load_ps(grids.zeros.data() + g));
          high = _mm256_sub_epi32(high, _mm256_mullo_epi32(zero, all_high));
          low = _mm256_sub_epi32(low, _mm256_mullo_epi32(zero, all_low));
        }
        __m256 part = _mm256_mul_ps(number(high, low), _mm256_load_ps(grids.scales.data() + g));
        if constexpr (OFFSETS) {
          part = _mm256_add_ps(part, _mm256_mul_ps(number(all_high, all_low), _mm256_load_ps(grids.shifts.data() + g)));
        }
        sums[half] = (__m256)fma((Floats)part, (Floats)unit, (Floats)sums[half]);
      }
    }
  }
}

template <bool OFFSETS>
void integers(const Packed& packed, const Tiles& tiles, const Numbers& x, const float* bias, float* y) {
  const int64_t blocks = (packed.rows + ROWS - 1) / ROWS;
  at::parallel_for(0, blocks, std::max<int64_t>(1, GRAIN / (packed.layout.columns * ROWS)), [&](int64_t begin, int64_t end) {
    Turned turned(packed);
    Grids grids(packed);
    for (int64_t first = begin * ROWS; first < end * ROWS; first += ROWS) {
      grids.read(first);
      turned.start(first);
      __m256 sums[HALVES] = {};
      outputs<OFFSETS>(turned, grids, tiles, x, sums);
      float out[ROWS];
      std::memcpy(out, sums, sizeof(out));
      const int64_t count = std::min(ROWS, packed.rows - first);
      for (int64_t r = 0; r < count; ++r) y[first + r] = out[r] + (bias ? bias[first + r] : 0.0f);
    }
  });
}

}  // namespace

#endif

namespace {

// The product with one row of input, if it can be had in integers.
bool in_integers(const Packed& packed, const float* x, const float* bias, float* y) {
#if defined(__AVX2__)
  if (packed.tables) return false;
  const Tiles& tiles = Tiles::of(packed.layout);
  if (!tiles.fit) return false;
  const Numbers numbers(x, tiles);
  if (!numbers.usable) return false;
  (packed.offsets ? integers<true> : integers<false>)(packed, tiles, numbers, bias, y);
  return true;
#else
  return false;
#endif
}

}  // namespace
