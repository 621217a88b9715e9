// Sixteen floats, as registers of the width that the flags allow.
//
// The compiler splits arithmetic of vectors that are wider than its registers, but takes their
// comparisons, choices and shuffles apart to single floats: so each part is one register.

#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "attention.h"

namespace octavo {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;  // SSE2 and NEON
#endif
constexpr int kParts = kLanes / kWidth;

typedef float Part __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Bits __attribute__((vector_size(4 * kWidth)));
typedef int32_t Whole __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));
typedef int8_t Bytes __attribute__((vector_size(kWidth)));

struct Floats {
  Part part[kParts];
};

struct Ints {
  Whole part[kParts];
};

using Mask = Ints;  // -1 or 0

#define EACH_PART(result, value)               \
  Floats result;                               \
  for (int p = 0; p < kParts; ++p) result.part[p] = value

inline Floats Splat(float value) {
  EACH_PART(all, Part{} + value);
  return all;
}

inline Floats operator+(Floats a, Floats b) {
  EACH_PART(sum, a.part[p] + b.part[p]);
  return sum;
}

inline Floats operator-(Floats a, Floats b) {
  EACH_PART(difference, a.part[p] - b.part[p]);
  return difference;
}

inline Floats operator*(Floats a, Floats b) {
  EACH_PART(product, a.part[p] * b.part[p]);
  return product;
}

inline Floats operator*(Floats a, float b) {
  EACH_PART(product, a.part[p] * b);
  return product;
}

// Sum of a and b * c, which is one instruction where there is one.
inline void Add(Floats& a, Floats b, Floats c) {
  for (int p = 0; p < kParts; ++p) a.part[p] += b.part[p] * c.part[p];
}

inline void Add(Floats& a, Floats b, float c) {
  for (int p = 0; p < kParts; ++p) a.part[p] += b.part[p] * c;
}

// b where one of them is NaN.
inline Floats Max(Floats a, Floats b) {
  EACH_PART(most, a.part[p] > b.part[p] ? a.part[p] : b.part[p]);
  return most;
}

inline float Max(float a, float b) { return a > b ? a : b; }

inline Floats Choose(Mask mask, Floats a, Floats b) {
  EACH_PART(chosen, mask.part[p] ? a.part[p] : b.part[p]);
  return chosen;
}

inline Ints AllOf(int32_t value) {
  Ints all;
  for (int p = 0; p < kParts; ++p) all.part[p] = Whole{} + value;
  return all;
}

// Which of first <= at <= last hold.
inline Mask Between(Ints first, Ints last, int32_t at) {
  Mask mask;
  for (int p = 0; p < kParts; ++p) mask.part[p] = (first.part[p] <= at) & (last.part[p] >= at);
  return mask;
}

// The first `count` lanes.
inline Mask Below(int count) {
  static constexpr int32_t kIndices[kLanes] = {0, 1, 2,  3,  4,  5,  6,  7,
                                               8, 9, 10, 11, 12, 13, 14, 15};
  Mask mask;
  for (int p = 0; p < kParts; ++p) {
    Whole indices;
    memcpy(&indices, kIndices + p * kWidth, sizeof indices);
    mask.part[p] = indices < count;
  }
  return mask;
}

inline Floats Load(const float* at) {
  Floats value;
  memcpy(&value, at, sizeof value);
  return value;
}

inline void Store(float* at, Floats value) { memcpy(at, &value, sizeof value); }

inline Part AsFloats(Bits bits) {
  Part value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline Bits AsBits(Part value) {
  Bits bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// As bfloat16, to nearest even; NaN stays NaN.
inline void StoreRounded(uint16_t* at, Floats value) {
  for (int p = 0; p < kParts; ++p) {
    const Bits bits = AsBits(value.part[p]);
    const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Bits narrow = (bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded;
#if defined(__AVX512F__)  // GCC 12 would narrow halves of it
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_cvtepi32_epi16((__m512i)narrow));
#else
    const Halves halves = __builtin_convertvector(narrow, Halves);
    memcpy(at + p * kWidth, &halves, sizeof halves);
#endif
  }
}

// Of e4m3fn: four bits of exponent, biased by 7, three of mantissa, no infinity. Nothing here is
// subnormal in float32, which a thread may have been told to flush.
inline Part FromFloat8(Bits codes) {
  const Bits size = codes & 127;
  const Part normal = AsFloats((size << 20) + (120u << 23));
  const Part subnormal = AsFloats((size << 20) + (121u << 23)) - 0x1p-6f;
  const Part value = size < 8 ? subnormal : normal;
  const Bits bits = size == 127 ? Bits{} + 0x7fc00000u : AsBits(value);
  return AsFloats(bits | (codes & 128) << 24);
}

// Bytes as 32-bit integers, which GCC would widen one by one.
inline Whole WidenSigned(const char* at) {
#if defined(__AVX512F__)
  return (Whole)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
#elif defined(__AVX2__)
  return (Whole)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
#else
  Bytes bytes;
  memcpy(&bytes, at, sizeof bytes);
  return __builtin_convertvector(bytes, Whole);
#endif
}

// Sixteen values of a type.
template <Type kType>
inline Floats LoadAs(const char* at, int64_t index) {
  Floats value;
  for (int p = 0; p < kParts; ++p) {
    const int64_t first = index + p * kWidth;
    if constexpr (kType == Type::kFloat32) {
      memcpy(&value.part[p], at + 4 * first, sizeof(Part));
    } else if constexpr (kType == Type::kBfloat16) {
#if defined(__AVX512F__)  // GCC 12 would widen halves of it, and put them together
      const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 2 * first));
      value.part[p] = (Part)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
#else
      Halves halves;
      memcpy(&halves, at + 2 * first, sizeof halves);
      value.part[p] = AsFloats(__builtin_convertvector(halves, Bits) << 16);
#endif
    } else if constexpr (kType == Type::kInt8) {
      value.part[p] = __builtin_convertvector(WidenSigned(at + first), Part);
    } else {
      value.part[p] = FromFloat8((Bits)WidenSigned(at + first));
    }
  }
  return value;
}

// e ** x for x <= 0 within two units in the last place; 0 below -87, and NaN for NaN.
inline Floats Exp(Floats of) {
  Floats result;
  for (int p = 0; p < kParts; ++p) {
    const Part x = of.part[p];
    constexpr float kShift = 0x1.8p23f;  // the sum's last bits are the nearest whole number
    const Part shifted = x * 1.44269504088896341f + kShift;
    const Part whole = shifted - kShift;
    Part rest = x - whole * 0.693359375f;
    rest = rest - whole * -2.12194440e-4f;
    Part sum = Part{} + 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    const Bits power = AsBits(shifted) - 0x4b400000u + 127u;
    const Part value = sum * AsFloats(power << 23);
    result.part[p] = x < -87.0f ? Part{} : value;
  }
  return result;
}

inline Floats Tanh(Floats of) {
  EACH_PART(size, of.part[p] < 0.0f ? -of.part[p] : of.part[p]);
  const Floats small = Exp(size * -2.0f);
  Floats result;
  for (int p = 0; p < kParts; ++p) {
    const Part value = (1.0f - small.part[p]) / (1.0f + small.part[p]);
    result.part[p] = of.part[p] < 0.0f ? -value : value;
  }
  return result;
}

#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)

// The sums of as many registers as one has lanes.
inline Part SumsOfParts(const Part* of) {
#if defined(__AVX512F__)
  Part pairs[8], fours[4], eights[2];
  for (int i = 0; i < 8; ++i) {
    const Part a = of[2 * i], b = of[2 * i + 1];
    pairs[i] = SHUFFLED(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
               SHUFFLED(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  }
  for (int i = 0; i < 4; ++i) {
    const Part a = pairs[2 * i], b = pairs[2 * i + 1];
    fours[i] = SHUFFLED(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               SHUFFLED(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
  for (int i = 0; i < 2; ++i) {
    const Part a = fours[2 * i], b = fours[2 * i + 1];
    eights[i] = SHUFFLED(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
                SHUFFLED(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  }
  const Part a = eights[0], b = eights[1];
  return SHUFFLED(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         SHUFFLED(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
#elif defined(__AVX2__)
  Part pairs[4], fours[2];
  for (int i = 0; i < 4; ++i) {
    const Part a = of[2 * i], b = of[2 * i + 1];
    pairs[i] = SHUFFLED(a, b, 0, 8, 2, 10, 4, 12, 6, 14) + SHUFFLED(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 2; ++i) {
    const Part a = pairs[2 * i], b = pairs[2 * i + 1];
    fours[i] = SHUFFLED(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLED(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  }
  const Part a = fours[0], b = fours[1];
  return SHUFFLED(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLED(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
#else
  Part pairs[2];
  for (int i = 0; i < 2; ++i) {
    const Part a = of[2 * i], b = of[2 * i + 1];
    pairs[i] = SHUFFLED(a, b, 0, 4, 2, 6) + SHUFFLED(a, b, 1, 5, 3, 7);
  }
  return SHUFFLED(pairs[0], pairs[1], 0, 1, 4, 5) + SHUFFLED(pairs[0], pairs[1], 2, 3, 6, 7);
#endif
}

// The sum of each of sixteen vectors.
inline Floats Sums(const Floats* of) {
  Part folded[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    folded[i] = of[i].part[0];
    for (int p = 1; p < kParts; ++p) folded[i] += of[i].part[p];
  }
  EACH_PART(sums, SumsOfParts(folded + p * kWidth));
  return sums;
}

// The highest of those that are numbers; `least`, if none is higher.
inline float Highest(Floats of, float least) {
  Part most = of.part[0];
  for (int p = 1; p < kParts; ++p) most = of.part[p] > most ? of.part[p] : most;
#if defined(__AVX512F__)
  const Part far = SHUFFLED(most, most, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  most = most > far ? most : far;
  const Part near = SHUFFLED(most, most, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  most = most > near ? most : near;
#elif defined(__AVX2__)
  const Part near = SHUFFLED(most, most, 4, 5, 6, 7, 0, 1, 2, 3);
  most = most > near ? most : near;
#endif
  for (int i = 0; i < 4; ++i) least = Max(most[i], least);
  return least;
}

inline float Total(Floats of) {
  Part sum = of.part[0];
  for (int p = 1; p < kParts; ++p) sum += of.part[p];
  float total = 0;
  for (int i = 0; i < kWidth; ++i) total += sum[i];
  return total;
}

}  // namespace
}  // namespace octavo
