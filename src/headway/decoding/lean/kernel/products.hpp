// y = x W^T + b for few rows of x: each weight is read once, in order, where it lies.
//
// x [rows, inputs], W [outputs, inputs], both contiguous in the inputs; y has a stride, so that several maps of the same
// input write side by side. Sums are in float32 and their order depends neither on the number of rows nor on the thread: a
// row's result is the same bit for bit whatever stands beside it.

#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "integers.hpp"
#include "tiles.hpp"
#include "vectors.hpp"

namespace headway {

constexpr int kOutputs = 4;  // rows of W that are read together
// How far ahead weights are asked for, into the second level of cache. Nearer, or into the first level, memory was read at half
// the speed (Zen 4). What is asked for beyond a matrix is mostly the next one: weights lie in the order of their use.
constexpr int kAheadBytes = 32768;
constexpr int kLine = 64;

struct Range {
    int64_t begin, end;
};

// A thread's part of the outputs, in whole groups.
inline Range share(int64_t outputs, int thread, int threads, int64_t group) {
    const int64_t groups = (outputs + group - 1) / group;
    return {std::min(outputs, groups * thread / threads * group), std::min(outputs, groups * (thread + 1) / threads * group)};
}

// What is left of a dot product after its whole vectors.
template <class Kind>
float rest_of_dot(const typename Kind::Number* a, const typename Kind::Number* b, int64_t count) {
    float total = 0.0f;
    for (int64_t j = 0; j < count; ++j) total += Kind::value(a[j]) * Kind::value(b[j]);
    return total;
}

// `Rows` rows of x times `Outputs` rows of W. `Lines` cache lines are asked for in every step, from `ahead` on.
template <class Kind, int Rows, int Outputs, int Lines>
inline void block(const typename Kind::Number* x, int64_t inputs, const typename Kind::Number* w,
                  const typename Kind::Number* bias, typename Kind::Number* y, int64_t y_stride, const char* ahead) {
    Vector sums[Rows][4];
    for (int r = 0; r < Rows; ++r)
        for (int o = 0; o < 4; ++o) sums[r][o] = zero();
    int64_t i = 0;
    for (; i + Kind::kStep <= inputs; i += Kind::kStep) {
        typename Kind::Piece weights[Outputs];
        for (int o = 0; o < Outputs; ++o) weights[o] = Kind::piece(w + o * inputs + i);
        for (int line = 0; line < Lines; ++line) _mm_prefetch(ahead + line * kLine, _MM_HINT_T1);
        ahead += Lines * kLine;
        for (int r = 0; r < Rows; ++r) {
            const typename Kind::Piece own = Kind::piece(x + r * inputs + i);
            for (int o = 0; o < Outputs; ++o) sums[r][o] = Kind::dot(own, weights[o], sums[r][o]);
        }
    }
    if (i < inputs) {
        typename Kind::Piece weights[Outputs];
        for (int o = 0; o < Outputs; ++o) weights[o] = Kind::part(w + o * inputs + i, inputs - i);
        for (int r = 0; r < Rows; ++r) {
            const typename Kind::Piece own = Kind::part(x + r * inputs + i, inputs - i);
            for (int o = 0; o < Outputs; ++o) sums[r][o] = Kind::dot(own, weights[o], sums[r][o]);
        }
    }
#if defined(HEADWAY_AVX512)
    if (Outputs == 4) {
        Vector found = lane_sums<Rows>(sums);
        if (bias) found = add(found, _mm512_broadcast_f32x4(Kind::widen_four(bias)));
        alignas(64) typename Kind::Number numbers[16];
        Kind::narrow(numbers, found);
        for (int r = 0; r < Rows; ++r) std::memcpy(y + r * y_stride, numbers + 4 * r, 4 * sizeof numbers[0]);
        return;
    }
#endif
    __m128 totals[Rows];
    sums_of_lanes<Rows>(sums, totals);
    for (int r = 0; r < Rows; ++r) {
        if (Outputs < 4) {
            alignas(16) float four[4];
            _mm_store_ps(four, totals[r]);
            for (int o = 0; o < Outputs; ++o)
                y[r * y_stride + o] = Kind::number(bias ? four[o] + Kind::value(bias[o]) : four[o]);
        } else {
            Kind::narrow_four(y + r * y_stride, bias ? _mm_add_ps(totals[r], Kind::widen_four(bias)) : totals[r]);
        }
    }
}

template <class Kind, int Rows, int Outputs>
inline void block_asking(int lines, const typename Kind::Number* x, int64_t inputs, const typename Kind::Number* w,
                         const typename Kind::Number* bias, typename Kind::Number* y, int64_t y_stride, const char* ahead) {
    switch (lines) {
        case 4: block<Kind, Rows, Outputs, 4>(x, inputs, w, bias, y, y_stride, ahead); break;
        case 2: block<Kind, Rows, Outputs, 2>(x, inputs, w, bias, y, y_stride, ahead); break;
        case 1: block<Kind, Rows, Outputs, 1>(x, inputs, w, bias, y, y_stride, ahead); break;
        default: block<Kind, Rows, Outputs, 0>(x, inputs, w, bias, y, y_stride, ahead); break;
    }
}

// Of the cache lines that one step of four outputs reads, those that pass `group` of `groups` asks for.
inline int lines_in_pass(int lines, int64_t group, int64_t groups) {
    if (groups == 1) return lines;
    if (lines == 4 && (groups == 2 || (groups == 3 && group == 0))) return 2;
    return group < lines ? 1 : 0;
}

// Rows in groups of four, each of which passes over the same weights. What lies ahead is asked for a part in each pass: asked for
// in the first one alone, memory would rest during the others.
template <class Kind, int Outputs>
inline void all_rows(const typename Kind::Number* x, int64_t rows, int64_t inputs, const typename Kind::Number* w,
                     const typename Kind::Number* bias, typename Kind::Number* y, int64_t y_stride, bool asks) {
    constexpr int kLines = static_cast<int>(4 * Kind::kStep * sizeof(typename Kind::Number)) / kLine;
    const int64_t groups = (rows + 3) / 4;
    const char* ahead = reinterpret_cast<const char*>(w) + kAheadBytes;
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t r = 4 * group;
        const int lines = asks ? lines_in_pass(kLines, group, groups) : 0;
        const auto* own = x + r * inputs;
        auto* out = y + r * y_stride;
        switch (rows - r) {
            case 1: block_asking<Kind, 1, Outputs>(lines, own, inputs, w, bias, out, y_stride, ahead); break;
            case 2: block_asking<Kind, 2, Outputs>(lines, own, inputs, w, bias, out, y_stride, ahead); break;
            case 3: block_asking<Kind, 3, Outputs>(lines, own, inputs, w, bias, out, y_stride, ahead); break;
            default: block_asking<Kind, 4, Outputs>(lines, own, inputs, w, bias, out, y_stride, ahead); break;
        }
        ahead += lines * kLine * (inputs / Kind::kStep);
    }
}

struct Matrix {
    const void* weight;
    const void* bias;  // or null
    int64_t outputs;
    const float* scales = nullptr;  // of int8 weights, one per output; null where weights are of the same kind as x
    const int32_t* sums = nullptr;  // of their rows
};

// Rows of x, made ready once for all matrices that they are multiplied by. One per thread.
template <class Kind>
class Input {
  public:
    using Number = typename Kind::Number;

    void set(const Number* x, int64_t rows, int64_t inputs, bool whole = false) {
        x_ = x;
        rows_ = rows;
        inputs_ = inputs;
        by_tiles_ = false;
        if (whole) {
            digits_.template set<Kind>(x, rows, inputs);
            return;
        }
        by_tiles_ = kTiles<Kind> && inputs % kTileInputs == 0 && tiles_allowed();
        if constexpr (kTiles<Kind>)
            if (by_tiles_) pair_up(x, rows, inputs, paired_);
    }

    // How outputs are divided between threads.
    int64_t group() const { return by_tiles_ ? 2 * kTileOutputs : kOutputs; }

    // Outputs begin .. end - 1, of which begin is the first of a group; y is that of output 0.
    void times(const Matrix& matrix, Range outputs, Number* y, int64_t y_stride) const {
        const auto* w = static_cast<const Number*>(matrix.weight);
        const auto* bias = static_cast<const Number*>(matrix.bias);
        if (matrix.scales) {
            whole_times<Kind>(digits_, rows_, static_cast<const int8_t*>(matrix.weight), matrix.scales, matrix.sums, bias,
                              outputs.begin, outputs.end, y, y_stride);
            return;
        }
        int64_t o = outputs.begin;
        if constexpr (kTiles<Kind>) {
            if (by_tiles_)
                o = tile_product(paired_.data(), rows_, inputs_, w, o, outputs.end, matrix.outputs, bias, y, y_stride);
        }
        for (; o + kOutputs <= outputs.end; o += kOutputs)
            all_rows<Kind, kOutputs>(x_, rows_, inputs_, w + o * inputs_, bias ? bias + o : nullptr, y + o, y_stride, true);
        for (; o < outputs.end; ++o)
            all_rows<Kind, 1>(x_, rows_, inputs_, w + o * inputs_, bias ? bias + o : nullptr, y + o, y_stride, false);
    }

  private:
    const Number* x_ = nullptr;
    int64_t rows_ = 0, inputs_ = 0;
    bool by_tiles_ = false;
    std::vector<uint16_t> paired_;
    Digits digits_;
};

}  // namespace headway
