// Products of bfloat16 by AMX tiles: W is the left operand, as it lies in memory.

#pragma once

#include <vector>

#include "vectors.hpp"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__linux__)
#define HEADWAY_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace headway {

constexpr int64_t kTileOutputs = 16;
constexpr int64_t kTileInputs = 32;
constexpr int64_t kTileRows = 16;

#if defined(HEADWAY_TILES)

template <class Kind>
constexpr bool kTiles = false;
template <>
inline constexpr bool kTiles<BFloat16> = true;

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {};
    uint8_t rows[16] = {};
};

inline bool tiles_allowed() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    static const bool allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return allowed;
}

// x in groups of 16 rows, each brought into pairs of inputs: [inputs / 2][rows of the group][2].
inline void pair_up(const uint16_t* x, int64_t rows, int64_t inputs, std::vector<uint16_t>& paired) {
    paired.resize(static_cast<size_t>(inputs * rows));
    for (int64_t first = 0; first < rows; first += kTileRows) {
        const int64_t count = rows - first < kTileRows ? rows - first : kTileRows;
        uint16_t* to = paired.data() + first * inputs;
        for (int64_t i = 0; i < inputs; i += 2)
            for (int64_t r = 0; r < count; ++r) std::memcpy(to + i * count + 2 * r, x + (first + r) * inputs + i, 4);
    }
}

// Whole groups of 32 outputs from `begin` on; returns the first output that is left.
inline int64_t tile_product(const uint16_t* paired, int64_t rows, int64_t inputs, const uint16_t* w, int64_t begin, int64_t end,
                            int64_t outputs, const uint16_t* bias, uint16_t* y, int64_t y_stride) {
    constexpr int64_t kPair = 2 * kTileOutputs;
    alignas(64) float sums[2][kTileOutputs][kTileRows];
    int64_t shaped = 0;
    int64_t o = begin;
    for (; o + kPair <= end; o += kPair) {
        const uint16_t* left = w + o * inputs;
        for (int64_t first = 0; first < rows; first += kTileRows) {
            const int64_t count = rows - first < kTileRows ? rows - first : kTileRows;
            if (count != shaped) {
                TileShapes shapes;
                for (int tile = 0; tile < 5; ++tile) {
                    shapes.rows[tile] = 16;
                    shapes.bytes_per_row[tile] = static_cast<uint16_t>(tile == 2 || tile == 3 ? 64 : 4 * count);
                }
                _tile_loadconfig(&shapes);
                shaped = count;
            }
            const uint16_t* right = paired + first * inputs;
            const bool ahead = first == 0 && o + 2 * kPair <= outputs;
            _tile_zero(0);
            _tile_zero(1);
            for (int64_t i = 0; i < inputs; i += kTileInputs) {
                if (ahead)
                    for (int64_t line = 0; line < kPair; ++line)
                        _mm_prefetch(reinterpret_cast<const char*>(left + (kPair + line) * inputs + i), _MM_HINT_T1);
                _tile_loadd(4, right + i * count, 4 * count);
                _tile_loadd(2, left + i, 2 * inputs);
                _tile_dpbf16ps(0, 2, 4);
                _tile_loadd(3, left + kTileOutputs * inputs + i, 2 * inputs);
                _tile_dpbf16ps(1, 3, 4);
            }
            _tile_stored(0, sums[0], sizeof sums[0][0]);
            _tile_stored(1, sums[1], sizeof sums[0][0]);
            for (int64_t half = 0; half < 2; ++half)
                for (int64_t n = 0; n < kTileOutputs; ++n) {
                    const int64_t output = o + half * kTileOutputs + n;
                    const float start = bias ? to_float(bias[output]) : 0.0f;
                    for (int64_t r = 0; r < count; ++r)
                        y[(first + r) * y_stride + output] = to_bfloat16(sums[half][n][r] + start);
                }
        }
    }
    if (shaped) _tile_release();
    return o;
}

#else

template <class Kind>
constexpr bool kTiles = false;
inline bool tiles_allowed() { return false; }

#endif

}  // namespace headway
