// Where the codes of a row are, and how those of several planes are put together.
//
// A row of codes is cut into *pieces*: stretches of columns in which the place of a code in its word and the group are
// constant. Within a piece neighbouring columns are neighbouring words, so that eight codes are a load and a mask. Any
// number of columns and any group size are therefore the same loop over pieces.
#pragma once

#include <algorithm>
#include <array>
#include <map>
#include <mutex>

#include "vectors.h"

namespace {

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

}  // namespace
