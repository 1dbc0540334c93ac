// y = x W^T + b for few rows of x: the time is that of reading W once, in order, by all threads.
//
// x [rows, inputs], W [outputs, inputs], both contiguous in the inputs; y has a stride, so that several maps of the
// same input write side by side. Sums are in float32 and their order does not depend on the number of rows: a row's
// result is the same bit for bit whatever stands beside it.

#include <cstdint>
#include <cstring>
#include <immintrin.h>
#include <vector>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int kOutputs = 4;  // rows of W that are read together
constexpr int kAhead = 4;    // of their successors are asked for early

#if defined(__AVX512F__)
using Vector = __m512;
constexpr int kLanes = 16;
inline Vector zero() { return _mm512_setzero_ps(); }
inline Vector load(const float* p) { return _mm512_loadu_ps(p); }
inline Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Vector v) { return _mm512_reduce_add_ps(v); }
#elif defined(__AVX2__) && defined(__FMA__)
using Vector = __m256;
constexpr int kLanes = 8;
inline Vector zero() { return _mm256_setzero_ps(); }
inline Vector load(const float* p) { return _mm256_loadu_ps(p); }
inline Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(Vector v) {
    __m128 low = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    low = _mm_add_ps(low, _mm_movehl_ps(low, low));
    return _mm_cvtss_f32(_mm_add_ss(low, _mm_shuffle_ps(low, low, 1)));
}
#else
#error "needs AVX2 with FMA, or AVX-512"
#endif

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

struct Float32 {
    using Number = float;
    using Piece = Vector;
    static constexpr int kStep = kLanes;
    static Piece piece(const Number* p) { return load(p); }
    static Vector dot(Piece a, Piece b, Vector c) { return fma(a, b, c); }
    static float value(Number n) { return n; }
    static Number number(float v) { return v; }
};

struct BFloat16 {
    using Number = uint16_t;
    static float value(Number n) { return to_float(n); }
    static Number number(float v) { return to_bfloat16(v); }
#if defined(__AVX512BF16__)
    using Piece = __m512bh;
    static constexpr int kStep = 32;
    static Piece piece(const Number* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }
    static Vector dot(Piece a, Piece b, Vector c) { return _mm512_dpbf16_ps(c, a, b); }
#elif defined(__AVX512F__)
    using Piece = Vector;
    static constexpr int kStep = 16;
    static Piece piece(const Number* p) {
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    static Vector dot(Piece a, Piece b, Vector c) { return fma(a, b, c); }
#else
    using Piece = Vector;
    static constexpr int kStep = 8;
    static Piece piece(const Number* p) {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
    static Vector dot(Piece a, Piece b, Vector c) { return fma(a, b, c); }
#endif
};

// `Rows` rows of x times `Outputs` rows of W.
template <class Kind, int Rows, int Outputs>
void block(const typename Kind::Number* x, int64_t inputs, const typename Kind::Number* w, const typename Kind::Number* bias,
           typename Kind::Number* y, int64_t y_stride, bool ahead) {
    Vector sums[Rows][Outputs];
    for (int r = 0; r < Rows; ++r)
        for (int o = 0; o < Outputs; ++o) sums[r][o] = zero();
    int64_t i = 0;
    for (; i + Kind::kStep <= inputs; i += Kind::kStep) {
        typename Kind::Piece weights[Outputs];
        for (int o = 0; o < Outputs; ++o) {
            weights[o] = Kind::piece(w + o * inputs + i);
            if (ahead) _mm_prefetch(reinterpret_cast<const char*>(w + (o + kAhead) * inputs + i), _MM_HINT_T0);
        }
        for (int r = 0; r < Rows; ++r) {
            const typename Kind::Piece own = Kind::piece(x + r * inputs + i);
            for (int o = 0; o < Outputs; ++o) sums[r][o] = Kind::dot(own, weights[o], sums[r][o]);
        }
    }
    for (int r = 0; r < Rows; ++r)
        for (int o = 0; o < Outputs; ++o) {
            float total = sum(sums[r][o]);
            for (int64_t j = i; j < inputs; ++j) total += Kind::value(x[r * inputs + j]) * Kind::value(w[o * inputs + j]);
            if (bias) total += Kind::value(bias[o]);
            y[r * y_stride + o] = Kind::number(total);
        }
}

template <class Kind, int Outputs>
void all_rows(const typename Kind::Number* x, int64_t rows, int64_t inputs, const typename Kind::Number* w,
              const typename Kind::Number* bias, typename Kind::Number* y, int64_t y_stride, bool ahead) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4)
        block<Kind, 4, Outputs>(x + r * inputs, inputs, w, bias, y + r * y_stride, y_stride, ahead && r == 0);
    const bool first = ahead && r == 0;
    const auto* rest = x + r * inputs;
    auto* out = y + r * y_stride;
    switch (rows - r) {
        case 1: block<Kind, 1, Outputs>(rest, inputs, w, bias, out, y_stride, first); break;
        case 2: block<Kind, 2, Outputs>(rest, inputs, w, bias, out, y_stride, first); break;
        case 3: block<Kind, 3, Outputs>(rest, inputs, w, bias, out, y_stride, first); break;
        default: break;
    }
}

template <class Kind>
void linear(const void* x_, int64_t rows, int64_t inputs, const void* w_, int64_t outputs, const void* bias_, void* y_,
            int64_t y_stride, int threads) {
    using Number = typename Kind::Number;
    const auto* x = static_cast<const Number*>(x_);
    const auto* w = static_cast<const Number*>(w_);
    const auto* bias = static_cast<const Number*>(bias_);
    auto* y = static_cast<Number*>(y_);
    const int64_t groups = outputs / kOutputs;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t o = g * kOutputs;
        all_rows<Kind, kOutputs>(x, rows, inputs, w + o * inputs, bias ? bias + o : nullptr, y + o, y_stride,
                                 o + 2 * kOutputs <= outputs);
    }
    for (int64_t o = groups * kOutputs; o < outputs; ++o)
        all_rows<Kind, 1>(x, rows, inputs, w + o * inputs, bias ? bias + o : nullptr, y + o, y_stride, false);
}

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__linux__)
#define HEADWAY_TILES 1

constexpr int kTileOutputs = 16;
constexpr int kTileInputs = 32;
constexpr int kMostRows = 16;

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {};
    uint8_t rows[16] = {};
};

bool tiles_allowed() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    static const bool allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return allowed;
}

// W is the left operand as it lies in memory, x the right one, brought into pairs of inputs: [inputs / 2][rows][2].
void linear_by_tiles(const uint16_t* x, int64_t rows, int64_t inputs, const uint16_t* w, int64_t outputs,
                     const uint16_t* bias, uint16_t* y, int64_t y_stride, int threads) {
    static thread_local std::vector<uint16_t> paired;
    paired.resize(static_cast<size_t>(inputs * rows));
    for (int64_t i = 0; i < inputs; i += 2)
        for (int64_t r = 0; r < rows; ++r)
            std::memcpy(&paired[static_cast<size_t>((i * rows) + 2 * r)], x + r * inputs + i, 4);
    const uint16_t* right = paired.data();
    TileShapes shapes;
    for (int tile = 0; tile < 5; ++tile) {
        shapes.rows[tile] = 16;
        shapes.bytes_per_row[tile] = static_cast<uint16_t>(tile == 2 || tile == 3 ? 64 : 4 * rows);
    }
    const int64_t pair = 2 * kTileOutputs;
    const int64_t groups = outputs / pair;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        _tile_loadconfig(&shapes);
        alignas(64) float sums[2][kTileOutputs][kMostRows];
#pragma omp for schedule(static)
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t o = g * pair;
            const uint16_t* left = w + o * inputs;
            const bool ahead = o + 2 * pair <= outputs;
            _tile_zero(0);
            _tile_zero(1);
            for (int64_t i = 0; i < inputs; i += kTileInputs) {
                if (ahead)
                    for (int64_t line = 0; line < pair; ++line)
                        _mm_prefetch(reinterpret_cast<const char*>(left + (pair + line) * inputs + i), _MM_HINT_T1);
                _tile_loadd(4, right + i * rows, 4 * rows);
                _tile_loadd(2, left + i, 2 * inputs);
                _tile_dpbf16ps(0, 2, 4);
                _tile_loadd(3, left + kTileOutputs * inputs + i, 2 * inputs);
                _tile_dpbf16ps(1, 3, 4);
            }
            _tile_stored(0, sums[0], sizeof sums[0][0]);
            _tile_stored(1, sums[1], sizeof sums[0][0]);
            for (int half = 0; half < 2; ++half)
                for (int n = 0; n < kTileOutputs; ++n) {
                    const int64_t output = o + half * kTileOutputs + n;
                    const float start = bias ? to_float(bias[output]) : 0.0f;
                    for (int64_t r = 0; r < rows; ++r) y[r * y_stride + output] = to_bfloat16(sums[half][n][r] + start);
                }
        }
        _tile_release();
    }
    const int64_t done = groups * pair;
    for (int64_t o = done; o < outputs; ++o)
        all_rows<BFloat16, 1>(x, rows, inputs, w + o * inputs, bias ? bias + o : nullptr, y + o, y_stride, false);
}
#endif

}  // namespace

extern "C" {
void headway_linear_float32(const void* x, int64_t rows, int64_t inputs, const void* w, int64_t outputs, const void* bias,
                            void* y, int64_t y_stride, int threads) {
    linear<Float32>(x, rows, inputs, w, outputs, bias, y, y_stride, threads);
}
void headway_linear_bfloat16(const void* x, int64_t rows, int64_t inputs, const void* w, int64_t outputs,
                             const void* bias, void* y, int64_t y_stride, int threads) {
#if defined(HEADWAY_TILES)
    if (inputs % kTileInputs == 0 && rows <= kMostRows && tiles_allowed()) {
        linear_by_tiles(static_cast<const uint16_t*>(x), rows, inputs, static_cast<const uint16_t*>(w), outputs,
                        static_cast<const uint16_t*>(bias), static_cast<uint16_t*>(y), y_stride, threads);
        return;
    }
#endif
    linear<BFloat16>(x, rows, inputs, w, outputs, bias, y, y_stride, threads);
}
}
