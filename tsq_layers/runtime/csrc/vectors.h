// Vectors of eight floats or words, and memory for them.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t LANES = 8;

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

}  // namespace
