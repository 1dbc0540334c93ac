// Vectors of floats, and the two kinds of numbers that weights and activations come in.
//
// Three sets of instructions: AVX-512 (with dot products of bfloat16 where the processor has them), and AVX2 with FMA. Which
// one is decided when the kernel is compiled, on the machine that runs it (-march=native).

#pragma once

#include <cstdint>
#include <cstring>
#include <immintrin.h>

namespace headway {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define HEADWAY_AVX512 1
using Vector = __m512;
constexpr int kLanes = 16;
inline Vector zero() { return _mm512_setzero_ps(); }
inline Vector all(float value) { return _mm512_set1_ps(value); }
inline Vector load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
inline Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
inline Vector sub(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
inline Vector mul(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
inline Vector div(Vector a, Vector b) { return _mm512_div_ps(a, b); }
inline Vector larger(Vector a, Vector b) { return _mm512_max_ps(a, b); }
inline Vector nearest(Vector a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vector zero_below(Vector value, Vector x, Vector limit) {
    return _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask(x, limit, _CMP_LT_OQ), _mm512_setzero_ps());
}
inline Vector times_power_of_two(Vector value, Vector exponent) {
    const __m512i bits = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(exponent), _mm512_set1_epi32(127)), 23);
    return _mm512_mul_ps(value, _mm512_castsi512_ps(bits));
}
#elif defined(__AVX2__) && defined(__FMA__)
using Vector = __m256;
constexpr int kLanes = 8;
inline Vector zero() { return _mm256_setzero_ps(); }
inline Vector all(float value) { return _mm256_set1_ps(value); }
inline Vector load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
inline Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
inline Vector sub(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
inline Vector mul(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
inline Vector div(Vector a, Vector b) { return _mm256_div_ps(a, b); }
inline Vector larger(Vector a, Vector b) { return _mm256_max_ps(a, b); }
inline Vector nearest(Vector a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vector zero_below(Vector value, Vector x, Vector limit) {
    return _mm256_andnot_ps(_mm256_cmp_ps(x, limit, _CMP_LT_OQ), value);
}
inline Vector times_power_of_two(Vector value, Vector exponent) {
    const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(exponent), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(value, _mm256_castsi256_ps(bits));
}
#else
#error "needs AVX2 with FMA, or AVX-512"
#endif

// e^x to about two units in the last place; 0 below -87, where a float has nothing left to say.
inline Vector exponential(Vector x) {
    const Vector lowest = all(-87.0f);
    const Vector bounded = larger(x, lowest);
    const Vector exponent = nearest(mul(bounded, all(1.44269504f)));
    // ln 2 in two parts, so that the rest is exact.
    Vector rest = fma(exponent, all(-0.693359375f), bounded);
    rest = fma(exponent, all(2.12194440e-4f), rest);
    Vector power = all(1.9875691500e-4f);
    power = fma(power, rest, all(1.3981999507e-3f));
    power = fma(power, rest, all(8.3334519073e-3f));
    power = fma(power, rest, all(4.1665795894e-2f));
    power = fma(power, rest, all(1.6666665459e-1f));
    power = fma(power, rest, all(5.0000001201e-1f));
    power = fma(power, mul(rest, rest), add(rest, all(1.0f)));
    return zero_below(times_power_of_two(power, exponent), x, lowest);
}

inline float sum(Vector v) {
#if defined(HEADWAY_AVX512)
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
#else
    __m256 half = v;
#endif
    __m128 low = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    low = _mm_add_ps(low, _mm_movehl_ps(low, low));
    return _mm_cvtss_f32(_mm_add_ss(low, _mm_shuffle_ps(low, low, 1)));
}

inline float largest(Vector v) {
    float lanes[kLanes];
    store(lanes, v);
    float found = lanes[0];
    for (int lane = 1; lane < kLanes; ++lane) found = lanes[lane] > found ? lanes[lane] : found;
    return found;
}

// Sums of the lanes of `Rows` times four vectors. The order of the additions is the same for every row and number of rows.
#if defined(HEADWAY_AVX512)
template <int Rows>
inline __m512 lane_sums(const Vector (&parts)[Rows][4]) {
    __m512 rows[4];
    for (int r = 0; r < 4; ++r) {
        if (r >= Rows) {
            rows[r] = _mm512_setzero_ps();
            continue;
        }
        const auto& part = parts[r < Rows ? r : 0];
        const __m512 first = _mm512_add_ps(_mm512_shuffle_f32x4(part[0], part[1], 0x44), _mm512_shuffle_f32x4(part[0], part[1], 0xEE));
        const __m512 second = _mm512_add_ps(_mm512_shuffle_f32x4(part[2], part[3], 0x44), _mm512_shuffle_f32x4(part[2], part[3], 0xEE));
        rows[r] = _mm512_add_ps(_mm512_shuffle_f32x4(first, second, 0x88), _mm512_shuffle_f32x4(first, second, 0xDD));
    }
    const __m512 low = _mm512_add_ps(_mm512_shuffle_ps(rows[0], rows[1], 0x44), _mm512_shuffle_ps(rows[0], rows[1], 0xEE));
    const __m512 high = _mm512_add_ps(_mm512_shuffle_ps(rows[2], rows[3], 0x44), _mm512_shuffle_ps(rows[2], rows[3], 0xEE));
    const __m512 found = _mm512_add_ps(_mm512_shuffle_ps(low, high, 0x88), _mm512_shuffle_ps(low, high, 0xDD));
    // Found are four groups, one per output, of four rows.
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), found);
}
#endif

template <int Rows>
inline void sums_of_lanes(const Vector (&parts)[Rows][4], __m128 (&totals)[Rows]) {
#if defined(HEADWAY_AVX512)
    const __m512 found = lane_sums<Rows>(parts);
    totals[0] = _mm512_castps512_ps128(found);
    if (Rows > 1) totals[Rows > 1 ? 1 : 0] = _mm512_extractf32x4_ps(found, 1);
    if (Rows > 2) totals[Rows > 2 ? 2 : 0] = _mm512_extractf32x4_ps(found, 2);
    if (Rows > 3) totals[Rows > 3 ? 3 : 0] = _mm512_extractf32x4_ps(found, 3);
#else
    for (int r = 0; r < Rows; ++r) {
        const __m256 both = _mm256_hadd_ps(_mm256_hadd_ps(parts[r][0], parts[r][1]), _mm256_hadd_ps(parts[r][2], parts[r][3]));
        totals[r] = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    }
#endif
}

inline float to_float(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// The first `count` of a piece's numbers, zeros behind them.
template <class Kind>
inline typename Kind::Piece padded(const typename Kind::Number* p, int64_t count) {
    alignas(64) typename Kind::Number numbers[Kind::kStep] = {};
    std::memcpy(numbers, p, static_cast<size_t>(count) * sizeof numbers[0]);
    return Kind::piece(numbers);
}

struct Float32 {
    using Number = float;
    using Piece = Vector;  // what a dot product takes at once
    static constexpr int kStep = kLanes;
    static Piece piece(const Number* p) { return load(p); }
#if defined(HEADWAY_AVX512)
    static Piece part(const Number* p, int64_t count) {
        return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), p);
    }
#else
    static Piece part(const Number* p, int64_t count) { return padded<Float32>(p, count); }
#endif
    static Vector dot(Piece a, Piece b, Vector c) { return fma(a, b, c); }
    static float value(Number n) { return n; }
    static Number number(float v) { return v; }
    static Vector widen(const Number* p) { return load(p); }
    static void narrow(Number* p, Vector v) { store(p, v); }
    static Vector rounded(Vector v) { return v; }
    static void narrow_four(Number* p, __m128 v) { _mm_storeu_ps(p, v); }
    static __m128 widen_four(const Number* p) { return _mm_loadu_ps(p); }
    static bool hidden(Number mask) {
        uint32_t bits;
        std::memcpy(&bits, &mask, sizeof bits);
        return (bits >> 31) != 0;
    }
};

struct BFloat16 {
    using Number = uint16_t;
    static float value(Number n) { return to_float(n); }
    static Number number(float v) { return to_bfloat16(v); }
    static bool hidden(Number mask) { return (mask & 0x8000u) != 0; }
    static __m128 widen_four(const Number* p) {
        const __m128i half = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
        return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(half), 16));
    }
    static void narrow_four(Number* p, __m128 v) {
        const __m128i bits = _mm_castps_si128(v);
        const __m128i odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
        const __m128i rounded = _mm_srli_epi32(_mm_add_epi32(_mm_add_epi32(bits, _mm_set1_epi32(0x7fff)), odd), 16);
        const __m128i quiet = _mm_or_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(0x40));
        const __m128i invalid = _mm_castps_si128(_mm_cmpunord_ps(v, v));
        const __m128i chosen = _mm_blendv_epi8(rounded, quiet, invalid);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(chosen, chosen));
    }
#if defined(HEADWAY_AVX512)
    static Vector widen(const Number* p) {
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    static __m512i rounded_bits(Vector v) {
        const __m512i bits = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i near = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
        return _mm512_srli_epi32(_mm512_mask_mov_epi32(near, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet), 16);
    }
    static void narrow(Number* p, Vector v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded_bits(v)));
    }
    static Vector rounded(Vector v) { return _mm512_castsi512_ps(_mm512_slli_epi32(rounded_bits(v), 16)); }
#else
    static Vector widen(const Number* p) {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
    static void narrow(Number* p, Vector v) {
        narrow_four(p, _mm256_castps256_ps128(v));
        narrow_four(p + 4, _mm256_extractf128_ps(v, 1));
    }
    static Vector rounded(Vector v) {
        alignas(16) Number bits[kLanes];
        narrow(bits, v);
        return widen(bits);
    }
#endif
#if defined(HEADWAY_AVX512) && defined(__AVX512BF16__)
    using Piece = __m512bh;
    static constexpr int kStep = 32;
    static Piece piece(const Number* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }
    static Piece part(const Number* p, int64_t count) {
        return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << count) - 1ull), p));
    }
    static Vector dot(Piece a, Piece b, Vector c) { return _mm512_dpbf16_ps(c, a, b); }
#else
    using Piece = Vector;
    static constexpr int kStep = kLanes;
    static Piece piece(const Number* p) { return widen(p); }
    static Piece part(const Number* p, int64_t count) { return padded<BFloat16>(p, count); }
    static Vector dot(Piece a, Piece b, Vector c) { return fma(a, b, c); }
#endif
};

}  // namespace headway
