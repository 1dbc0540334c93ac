// y = x W^T + b where W is int8 with a scale per output. x is rounded to sixteen bits per number with a scale per row, and
// sums are whole numbers: their order does not matter, and every set of instructions gives the same bits.
//
// Rows of W are padded with zeros to a multiple of 64 inputs.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.hpp"

namespace headway {

constexpr int64_t kPadding = 64;

inline int64_t padded_inputs(int64_t inputs) { return (inputs + kPadding - 1) / kPadding * kPadding; }

// Rows of x as whole numbers: x = scale * whole, and whole + 32768 = 256 * high + low.
class Digits {
  public:
    template <class Kind>
    void set(const typename Kind::Number* x, int64_t rows, int64_t inputs) {
        padded = padded_inputs(inputs);
        whole.assign(static_cast<size_t>(rows * padded), 0);
        high.assign(static_cast<size_t>(rows * padded), 0);
        low.assign(static_cast<size_t>(rows * padded), 0);
        scales.resize(static_cast<size_t>(rows));
        for (int64_t r = 0; r < rows; ++r) {
            float largest = 0.0f;
            for (int64_t i = 0; i < inputs; ++i) largest = std::max(largest, std::fabs(Kind::value(x[r * inputs + i])));
            const float inverse = largest > 0.0f ? 32767.0f / largest : 0.0f;
            scales[static_cast<size_t>(r)] = largest / 32767.0f;
            for (int64_t i = 0; i < inputs; ++i) {
                const float value = Kind::value(x[r * inputs + i]) * inverse;
                const int32_t number = static_cast<int32_t>(std::nearbyint(value));
                const size_t place = static_cast<size_t>(r * padded + i);
                whole[place] = static_cast<int16_t>(number);
                high[place] = static_cast<uint8_t>((number + 32768) >> 8);
                low[place] = static_cast<uint8_t>((number + 32768) & 255);
            }
        }
    }

    int64_t padded = 0;
    std::vector<int16_t> whole;
    std::vector<uint8_t> high, low;
    std::vector<float> scales;
};

#if defined(HEADWAY_AVX512) && defined(__AVX512VNNI__)
// As `lane_sums`, of four times four vectors of whole numbers.
inline __m512i whole_sums(const __m512i (&parts)[4][4]) {
    __m512i rows[4];
    for (int r = 0; r < 4; ++r) {
        const auto& part = parts[r];
        const __m512i first = _mm512_add_epi32(_mm512_shuffle_i32x4(part[0], part[1], 0x44), _mm512_shuffle_i32x4(part[0], part[1], 0xEE));
        const __m512i second = _mm512_add_epi32(_mm512_shuffle_i32x4(part[2], part[3], 0x44), _mm512_shuffle_i32x4(part[2], part[3], 0xEE));
        rows[r] = _mm512_add_epi32(_mm512_shuffle_i32x4(first, second, 0x88), _mm512_shuffle_i32x4(first, second, 0xDD));
    }
    const __m512i low = _mm512_add_epi32(_mm512_unpacklo_epi64(rows[0], rows[1]), _mm512_unpackhi_epi64(rows[0], rows[1]));
    const __m512i high = _mm512_add_epi32(_mm512_unpacklo_epi64(rows[2], rows[3]), _mm512_unpackhi_epi64(rows[2], rows[3]));
    const __m512 even = _mm512_shuffle_ps(_mm512_castsi512_ps(low), _mm512_castsi512_ps(high), 0x88);
    const __m512 odd = _mm512_shuffle_ps(_mm512_castsi512_ps(low), _mm512_castsi512_ps(high), 0xDD);
    const __m512i found = _mm512_add_epi32(_mm512_castps_si512(even), _mm512_castps_si512(odd));
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), found);
}
#endif

// `Rows` rows (one or two) of x times four rows of W, as whole numbers.
template <int Rows>
inline void whole_products(const Digits& x, int64_t row, const int8_t* const (&w)[4], const int32_t* const (&sums)[4],
                           int64_t (&totals)[Rows][4]) {
#if defined(HEADWAY_AVX512) && defined(__AVX512VNNI__)
    __m512i parts[4][4];
    for (auto& part : parts)
        for (__m512i& one : part) one = _mm512_setzero_si512();
    for (int64_t i = 0; i < x.padded; i += 64) {
        __m512i weights[4];
        for (int o = 0; o < 4; ++o) {
            weights[o] = _mm512_loadu_si512(w[o] + i);
            _mm_prefetch(reinterpret_cast<const char*>(w[o] + i) + 32768, _MM_HINT_T1);
        }
        for (int r = 0; r < Rows; ++r) {
            const __m512i high = _mm512_loadu_si512(x.high.data() + (row + r) * x.padded + i);
            const __m512i low = _mm512_loadu_si512(x.low.data() + (row + r) * x.padded + i);
            for (int o = 0; o < 4; ++o) {
                parts[2 * r][o] = _mm512_dpbusd_epi32(parts[2 * r][o], high, weights[o]);
                parts[2 * r + 1][o] = _mm512_dpbusd_epi32(parts[2 * r + 1][o], low, weights[o]);
            }
        }
    }
    alignas(64) int32_t found[16];
    _mm512_store_si512(found, whole_sums(parts));
    for (int r = 0; r < Rows; ++r)
        for (int o = 0; o < 4; ++o)
            totals[r][o] = int64_t{256} * found[8 * r + o] + found[8 * r + 4 + o] - int64_t{32768} * *sums[o];
#else
    (void)sums;
    constexpr int64_t kPiece = 2048;  // so many products of 8 and 16 bits fit into 32 bits, eight lanes side by side
    for (int r = 0; r < Rows; ++r)
        for (int o = 0; o < 4; ++o) {
            const int16_t* own = x.whole.data() + (row + r) * x.padded;
            int64_t total = 0;
            for (int64_t begin = 0; begin < x.padded; begin += kPiece) {
                __m256i part = _mm256_setzero_si256();
                for (int64_t i = begin; i < std::min(x.padded, begin + kPiece); i += 16) {
                    const __m256i weights = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w[o] + i)));
                    const __m256i numbers = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(own + i));
                    part = _mm256_add_epi32(part, _mm256_madd_epi16(weights, numbers));
                }
                alignas(32) int32_t lanes[8];
                _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), part);
                for (const int32_t lane : lanes) total += lane;
            }
            totals[r][o] = total;
        }
#endif
}

template <class Kind, int Rows>
inline void whole_rows(const Digits& x, int64_t row, const int8_t* w, const float* scales, const int32_t* sums,
                       const typename Kind::Number* bias, int64_t o, int64_t count, typename Kind::Number* y, int64_t y_stride) {
    const int8_t* own[4];
    const int32_t* own_sums[4];
    for (int64_t n = 0; n < 4; ++n) {
        const int64_t output = o + std::min(n, count - 1);
        own[n] = w + output * x.padded;
        own_sums[n] = sums + output;
    }
    int64_t totals[Rows][4];
    whole_products<Rows>(x, row, own, own_sums, totals);
    for (int64_t r = 0; r < Rows; ++r)
        for (int64_t n = 0; n < count; ++n) {
            const double scale = static_cast<double>(scales[o + n]) * x.scales[static_cast<size_t>(row + r)];
            const float value = static_cast<float>(static_cast<double>(totals[r][n]) * scale);
            y[(row + r) * y_stride + o + n] = Kind::number(bias ? value + Kind::value(bias[o + n]) : value);
        }
}

// Outputs begin .. end - 1 of all rows.
template <class Kind>
void whole_times(const Digits& x, int64_t rows, const int8_t* w, const float* scales, const int32_t* sums,
                 const typename Kind::Number* bias, int64_t begin, int64_t end, typename Kind::Number* y, int64_t y_stride) {
    for (int64_t o = begin; o < end; o += 4) {
        const int64_t count = std::min<int64_t>(4, end - o);
        int64_t r = 0;
        for (; r + 2 <= rows; r += 2) whole_rows<Kind, 2>(x, r, w, scales, sums, bias, o, count, y, y_stride);
        if (r < rows) whole_rows<Kind, 1>(x, r, w, scales, sums, bias, o, count, y, y_stride);
    }
}

}  // namespace headway
