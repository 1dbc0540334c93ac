// What `headway.decoding.lean` calls. Products: products.hpp; whole decoder layers: layers.hpp; drafts: chain.hpp, draft.hpp.

#include "draft.hpp"

namespace {

using namespace headway;

// Products of one input with `count` matrices, each y `y_step` numbers after the one before.
template <class Kind>
void linear(const void* x_, int64_t rows, int64_t inputs, const Matrix* matrices, int64_t count, void* y_, int64_t y_stride,
            int64_t y_step, int threads) {
    using Number = typename Kind::Number;
    const auto* x = static_cast<const Number*>(x_);
    auto* y = static_cast<Number*>(y_);
    static thread_local Input<Kind> input;
    input.set(x, rows, inputs, matrices[0].scales != nullptr);
    const Input<Kind>& ready = input;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#if defined(_OPENMP)
        const int thread = omp_get_thread_num(), members = omp_get_num_threads();
#else
        const int thread = 0, members = 1;
#endif
        for (int64_t m = 0; m < count; ++m)
            ready.times(matrices[m], share(matrices[m].outputs, thread, members, ready.group()), y + m * y_step, y_stride);
    }
}

}  // namespace

extern "C" {
void headway_linear_float32(const void* x, int64_t rows, int64_t inputs, const Matrix* matrices, int64_t count, void* y,
                            int64_t y_stride, int64_t y_step, int threads) {
    linear<Float32>(x, rows, inputs, matrices, count, y, y_stride, y_step, threads);
}
void headway_linear_bfloat16(const void* x, int64_t rows, int64_t inputs, const Matrix* matrices, int64_t count, void* y,
                             int64_t y_stride, int64_t y_step, int threads) {
    linear<BFloat16>(x, rows, inputs, matrices, count, y, y_stride, y_step, threads);
}
void headway_layers_float32(const Pass* pass, const Layer* layers, int64_t count) {
    run_layers<Float32>(*pass, layers, count);
}
void headway_layers_bfloat16(const Pass* pass, const Layer* layers, int64_t count) {
    run_layers<BFloat16>(*pass, layers, count);
}
void headway_chain_float32(const Chain* chain) { run_chain<Float32>(*chain); }
void headway_chain_bfloat16(const Chain* chain) { run_chain<BFloat16>(*chain); }
void headway_draft_float32(const Draft* draft) { run_draft<Float32>(*draft); }
void headway_draft_bfloat16(const Draft* draft) { run_draft<BFloat16>(*draft); }
// Reads memory as fast as it comes: the limit that steps are compared with. Returns a sum, so that nobody leaves it out.
float headway_read(const float* numbers, int64_t count, int threads) {
    float total = 0.0f;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(+ : total)
    {
#if defined(_OPENMP)
        const int thread = omp_get_thread_num(), members = omp_get_num_threads();
#else
        const int thread = 0, members = 1;
#endif
        const Range own = share(count, thread, members, 8 * kLanes);
        Vector sums[8];
        for (Vector& one : sums) one = zero();
        for (int64_t i = own.begin; i + 8 * kLanes <= own.end; i += 8 * kLanes)
            for (int part = 0; part < 8; ++part) {
                _mm_prefetch(reinterpret_cast<const char*>(numbers + i + part * kLanes) + kAheadBytes, _MM_HINT_T1);
                sums[part] = add(sums[part], load(numbers + i + part * kLanes));
            }
        for (const Vector& one : sums) total += sum(one);
    }
    return total;
}
const char* headway_instructions() {
#if defined(HEADWAY_TILES)
    return tiles_allowed() ? "AMX, AVX-512" : "AVX-512, without the AMX that the system refuses";
#elif defined(HEADWAY_AVX512) && defined(__AVX512BF16__)
    return "AVX-512 with bfloat16";
#elif defined(HEADWAY_AVX512)
    return "AVX-512";
#else
    return "AVX2 with FMA";
#endif
}
int headway_has_tiles() {
#if defined(HEADWAY_TILES)
    return tiles_allowed() ? 1 : 0;
#else
    return 0;
#endif
}
}
