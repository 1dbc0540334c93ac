// Decoder layers of the llama-like families (pre-norm) on a block of few positions: one parallel region for all of them.
//
//     x = x + out(attention(norm(x))),   x = x + down(silu(gate(norm(x))) * up(norm(x)))
//
// B rows of the batch, M positions of the block, D width, H query heads, K key/value heads, d width of a head, r rotated part
// of it, S visible slots, F inner width. Threads share outputs of products and pairs of (batch row, key/value head); norms are
// cheaper to repeat than to wait for. Numbers are rounded wherever the family stores a tensor. What a position gets depends
// on its own row and on the slots that it sees, bit for bit, and not on other rows, positions, hidden slots or threads.

#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "products.hpp"

namespace headway {

// Everything is eight bytes wide: `headway.decoding.lean.stack` has the same fields in the same order.
struct Layer {
    Matrix q, k, v, out, gate, up, down;
    const void *attention_norm, *mlp_norm;  // [D]
    const void *q_norm, *k_norm;            // [d] per head, or null
    int64_t view;                           // what it sees
};

struct Store {
    void *keys, *values;  // [B, K, slots, d], contiguous in slots and d
};

// What layers with one attention window see.
struct View {
    const void* mask;  // additive [B, M, S], 0 or negative; null where all positions see all visible slots
    int64_t mask_batch_stride, mask_row_stride;
    int64_t start, length;
    int64_t chain;   // 1: a position sees its own slot and those before it, `window` of them at most (0: all)
    int64_t window;
};

struct Pass {
    int64_t batch, positions, width, heads, kv_heads, head_width, rotated, inner;
    double eps, scale;
    const View* views;
    const Store* stores;                // one per layer
    int64_t batch_stride, head_stride;  // of keys and values, in numbers
    const int64_t* slots;         // [B, M]: where keys and values go
    const int64_t* position_ids;  // [B, M]: row of the rotary table
    const void *cos, *sin;        // [any, r]; sin with its first half negated
    void* states;                 // [layers + 1, B * M, D]: the first is the input, the others are written
    const void* final_norm;       // [D], or null
    void* normed;                 // [B * M, D]: the last state after the final norm
    int64_t threads;
};

template <class Kind>
void norm_row(const typename Kind::Number* x, const typename Kind::Number* weight, double eps,
                                        int64_t width, typename Kind::Number* y) {
    Vector squares = zero();
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
        const Vector part = Kind::widen(x + i);
        squares = fma(part, part, squares);
    }
    float total = sum(squares);
    for (int64_t j = i; j < width; ++j) total += Kind::value(x[j]) * Kind::value(x[j]);
    const float factor = 1.0f / std::sqrt(total / static_cast<float>(width) + static_cast<float>(eps));
    const Vector factors = all(factor);
    for (i = 0; i + kLanes <= width; i += kLanes)
        Kind::narrow(y + i, mul(Kind::widen(weight + i), Kind::rounded(mul(Kind::widen(x + i), factors))));
    for (; i < width; ++i)
        y[i] = Kind::number(Kind::value(weight[i]) * Kind::value(Kind::number(Kind::value(x[i]) * factor)));
}

// gate = silu(gate) * up
template <class Kind>
void gated(typename Kind::Number* gate, const typename Kind::Number* up, int64_t count) {
    using Number = typename Kind::Number;
    const auto some = [](Number* g, const Number* u) {
        const Vector x = Kind::widen(g);
        const Vector active = div(x, add(all(1.0f), exponential(sub(zero(), x))));
        Kind::narrow(g, mul(Kind::rounded(active), Kind::widen(u)));
    };
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) some(gate + i, up + i);
    if (i < count) {
        Number rest[2][kLanes] = {};
        std::copy(gate + i, gate + count, rest[0]);
        std::copy(up + i, up + count, rest[1]);
        some(rest[0], rest[1]);
        std::copy(rest[0], rest[0] + (count - i), gate + i);
    }
}

template <class Kind>
void rotate(const typename Kind::Number* x, const typename Kind::Number* cos, const typename Kind::Number* sin,
            int64_t rotated, int64_t width, typename Kind::Number* y) {
    const int64_t half = rotated / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float low = Kind::value(x[i]), high = Kind::value(x[i + half]);
        y[i] = Kind::number(low * Kind::value(cos[i]) + high * Kind::value(sin[i]));
        y[i + half] = Kind::number(high * Kind::value(cos[i + half]) + low * Kind::value(sin[i + half]));
    }
    for (int64_t i = rotated; i < width; ++i) y[i] = x[i];
}

// Dot products of one query with the keys of sixteen slots, of which those beyond `last` repeat it.
template <class Kind>
inline void sixteen_scores(const typename Kind::Number* query, const typename Kind::Number* keys, int64_t first, int64_t last,
                           int64_t width, float scale, float* scores) {
    for (int64_t four = 0; four < 16; four += 4) {
        const typename Kind::Number* own[4];
        for (int64_t s = 0; s < 4; ++s) own[s] = keys + std::min(first + four + s, last) * width;
        Vector parts[1][4] = {{zero(), zero(), zero(), zero()}};
        int64_t i = 0;
        for (; i + Kind::kStep <= width; i += Kind::kStep) {
            const typename Kind::Piece piece = Kind::piece(query + i);
            for (int s = 0; s < 4; ++s) parts[0][s] = Kind::dot(piece, Kind::piece(own[s] + i), parts[0][s]);
        }
        __m128 totals[1];
        sums_of_lanes<1>(parts, totals);
        alignas(16) float found[4];
        _mm_store_ps(found, totals[0]);
        if (i < width)
            for (int s = 0; s < 4; ++s) found[s] += rest_of_dot<Kind>(query + i, own[s] + i, width - i);
        for (int s = 0; s < 4; ++s) scores[four + s] = found[s] * scale;
    }
}

// Scores to weights in place, over whole vectors; hidden ones are -infinity. Returns 1 / sum.
inline float soften(float* scores, int64_t count) {
    Vector most = all(-std::numeric_limits<float>::infinity());
    for (int64_t s = 0; s < count; s += kLanes) most = larger(most, load(scores + s));
    const Vector highest = all(largest(most));
    // Sixteen partial sums whatever the vectors' width, one per slot modulo sixteen.
    Vector totals[16 / kLanes];
    for (Vector& total : totals) total = zero();
    for (int64_t s = 0; s < count; s += 16)
        for (int part = 0; part < 16 / kLanes; ++part) {
            const Vector weight = exponential(sub(load(scores + s + part * kLanes), highest));
            store(scores + s + part * kLanes, weight);
            totals[part] = add(totals[part], weight);
        }
    float total = 0.0f;
    for (const Vector& part : totals) total += sum(part);
    return 1.0f / total;
}

template <class Kind>
float weighted_sum(const float* weights, const typename Kind::Number* values, int64_t count,
                                             int64_t step) {
    float total = 0.0f;
    for (int64_t s = 0; s < count; ++s) total += weights[s] * Kind::value(values[s * step]);
    return total;
}

// Weighted sums of values for `Queries` queries; slots one after the other.
template <class Kind, int Queries>
inline void weigh(const float* weights, int64_t stride, const float* inverse, const typename Kind::Number* values, int64_t count,
                  int64_t width, typename Kind::Number* const* out) {
    constexpr int kParts = 4;
    int64_t i = 0;
    for (; i + kLanes <= width; i += kParts * kLanes) {
        const int parts = static_cast<int>(std::min<int64_t>(kParts, (width - i) / kLanes));
        Vector sums[Queries][kParts];
        for (int q = 0; q < Queries; ++q)
            for (int p = 0; p < kParts; ++p) sums[q][p] = zero();
        if (parts == kParts) {
            for (int64_t s = 0; s < count; ++s) {
                Vector own[kParts];
                for (int p = 0; p < kParts; ++p) own[p] = Kind::widen(values + s * width + i + p * kLanes);
                for (int q = 0; q < Queries; ++q) {
                    const Vector weight = all(weights[q * stride + s]);
                    for (int p = 0; p < kParts; ++p) sums[q][p] = fma(weight, own[p], sums[q][p]);
                }
            }
        } else {
            for (int64_t s = 0; s < count; ++s)
                for (int p = 0; p < parts; ++p) {
                    const Vector own = Kind::widen(values + s * width + i + p * kLanes);
                    for (int q = 0; q < Queries; ++q) sums[q][p] = fma(all(weights[q * stride + s]), own, sums[q][p]);
                }
        }
        for (int q = 0; q < Queries; ++q)
            for (int p = 0; p < parts; ++p) Kind::narrow(out[q] + i + p * kLanes, mul(sums[q][p], all(inverse[q])));
        if (parts < kParts) {
            i += parts * kLanes;
            break;
        }
    }
    for (; i < width; ++i)
        for (int q = 0; q < Queries; ++q)
            out[q][i] = Kind::number(weighted_sum<Kind>(weights + q * stride, values + i, count, width) * inverse[q]);
}

// What a thread needs for itself.
template <class Kind>
struct Scratch {
    using Number = typename Kind::Number;
    std::vector<Number> normed, queries;
    std::vector<float> scores;
    Input<Kind> input;
};

// One row of the batch and one key/value head: store keys and values, then let the queries of the group look.
template <class Kind>
void attend(const Pass& pass, const Layer& layer, const Store& stored, int64_t b, int64_t kv, const typename Kind::Number* qkv,
            typename Kind::Number* mixed, Scratch<Kind>& own) {
    using Number = typename Kind::Number;
    constexpr int64_t kQueries = 4;
    const int64_t d = pass.head_width, M = pass.positions, groups = pass.heads / pass.kv_heads;
    const int64_t row_width = (pass.heads + 2 * pass.kv_heads) * d;
    const View& view = pass.views[layer.view];
    Number* keys = static_cast<Number*>(stored.keys) + b * pass.batch_stride + kv * pass.head_stride;
    Number* values = static_cast<Number*>(stored.values) + b * pass.batch_stride + kv * pass.head_stride;
    own.queries.resize(static_cast<size_t>((M * groups + 1) * d));
    Number* spare = own.queries.data() + M * groups * d;
    const auto turned = [&](const Number* x, const void* norm, int64_t position, Number* y) {
        if (norm) {
            norm_row<Kind>(x, static_cast<const Number*>(norm), pass.eps, d, spare);
            x = spare;
        }
        rotate<Kind>(x, static_cast<const Number*>(pass.cos) + position * pass.rotated,
                     static_cast<const Number*>(pass.sin) + position * pass.rotated, pass.rotated, d, y);
    };
    for (int64_t m = 0; m < M; ++m) {
        const int64_t row = b * M + m, slot = pass.slots[row], position = pass.position_ids[row];
        const Number* line = qkv + row * row_width;
        turned(line + (pass.heads + kv) * d, layer.k_norm, position, keys + slot * d);
        std::copy_n(line + (pass.heads + pass.kv_heads + kv) * d, d, values + slot * d);
        for (int64_t g = 0; g < groups; ++g)
            turned(line + (kv * groups + g) * d, layer.q_norm, position, own.queries.data() + (m * groups + g) * d);
    }
    // Slots are counted from a multiple of sixteen, so that sums are made in the same order wherever the window begins.
    const int64_t begin = view.start & ~int64_t{15}, end = view.start + view.length;
    const int64_t count = (end - begin + 15) & ~int64_t{15};
    own.scores.resize(static_cast<size_t>(kQueries * count));
    float* scores = own.scores.data();
    const float scale = static_cast<float>(pass.scale), nothing = -std::numeric_limits<float>::infinity();
    for (int64_t first = 0; first < M * groups; first += kQueries) {
        const int64_t queries = std::min(kQueries, M * groups - first);
        float inverse[kQueries];
        Number* out[kQueries];
        for (int64_t s = 0; s < count; s += 16)
            for (int64_t q = 0; q < queries; ++q)
                sixteen_scores<Kind>(own.queries.data() + (first + q) * d, keys, begin + s, end - 1, d, scale,
                                     scores + q * count + s);
        for (int64_t q = 0; q < queries; ++q) {
            const int64_t m = (first + q) / groups, g = (first + q) % groups;
            float* line = scores + q * count;
            std::fill(line, line + (view.start - begin), nothing);
            std::fill(line + (end - begin), line + count, nothing);
            if (view.chain) {
                const int64_t last = pass.slots[b * M + m], first = view.window ? last + 1 - view.window : 0;
                if (first > begin) std::fill(line, line + std::min(first - begin, count), nothing);
                std::fill(line + (last + 1 - begin), line + count, nothing);
            }
            if (view.mask) {
                const Number* mask =
                    static_cast<const Number*>(view.mask) + b * view.mask_batch_stride + m * view.mask_row_stride;
                float* visible = line + (view.start - begin);
                for (int64_t s = 0; s < view.length; ++s) visible[s] = Kind::hidden(mask[s]) ? nothing : visible[s];
            }
            inverse[q] = soften(line, count);
            out[q] = mixed + (b * M + m) * pass.heads * d + (kv * groups + g) * d;
        }
        const Number* from = values + begin * d;
        switch (queries) {
            case 4: weigh<Kind, 4>(scores, count, inverse, from, end - begin, d, out); break;
            case 3: weigh<Kind, 3>(scores, count, inverse, from, end - begin, d, out); break;
            case 2: weigh<Kind, 2>(scores, count, inverse, from, end - begin, d, out); break;
            default: weigh<Kind, 1>(scores, count, inverse, from, end - begin, d, out); break;
        }
    }
}

template <class Kind>
void add_rows(const typename Kind::Number* x, const typename Kind::Number* y, Range columns, int64_t rows, int64_t width,
              typename Kind::Number* to) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = r * width + columns.begin; i < r * width + columns.end; ++i)
            to[i] = Kind::number(Kind::value(x[i]) + Kind::value(y[i]));
}

template <class Kind>
void run_layers(const Pass& pass, const Layer* layers, int64_t count) {
    using Number = typename Kind::Number;
    const int64_t R = pass.batch * pass.positions, D = pass.width, F = pass.inner;
    const int64_t attended = pass.heads * pass.head_width, stored = pass.kv_heads * pass.head_width;
    const int64_t row_width = attended + 2 * stored;
    static thread_local std::vector<Number> shared;
    shared.resize(static_cast<size_t>(R * (row_width + attended + 2 * D + 2 * F)));
    Number* const qkv = shared.data();
    Number* const mixed = qkv + R * row_width;
    Number* const between = mixed + R * attended;
    Number* const change = between + R * D;
    Number* const gate = change + R * D;
    Number* const up = gate + R * F;
    const int threads = static_cast<int>(pass.threads);
    const bool whole = layers[0].q.scales != nullptr;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#if defined(_OPENMP)
        const int thread = omp_get_thread_num(), members = omp_get_num_threads();
#else
        const int thread = 0, members = 1;
#endif
        static thread_local Scratch<Kind> own;
        own.normed.resize(static_cast<size_t>(R * D));
        Input<Kind>& input = own.input;
        const auto norm_all = [&](const Number* x, const void* weight) {
            for (int64_t r = 0; r < R; ++r)
                norm_row<Kind>(x + r * D, static_cast<const Number*>(weight), pass.eps, D, own.normed.data() + r * D);
            input.set(own.normed.data(), R, D, whole);
        };
        const auto part = [&](int64_t outputs) { return share(outputs, thread, members, input.group()); };
        for (int64_t l = 0; l < count; ++l) {
            const Layer& layer = layers[l];
            const Number* before = static_cast<const Number*>(pass.states) + l * R * D;
            Number* after = static_cast<Number*>(pass.states) + (l + 1) * R * D;
            norm_all(before, layer.attention_norm);
            input.times(layer.q, part(attended), qkv, row_width);
            input.times(layer.k, part(stored), qkv + attended, row_width);
            input.times(layer.v, part(stored), qkv + attended + stored, row_width);
#pragma omp barrier
            const Range items = share(pass.batch * pass.kv_heads, thread, members, 1);
            for (int64_t item = items.begin; item < items.end; ++item)
                attend<Kind>(pass, layer, pass.stores[l], item / pass.kv_heads, item % pass.kv_heads, qkv, mixed, own);
#pragma omp barrier
            input.set(mixed, R, attended, whole);
            Range columns = part(D);
            input.times(layer.out, columns, change, D);
            add_rows<Kind>(before, change, columns, R, D, between);
#pragma omp barrier
            norm_all(between, layer.mlp_norm);
            columns = part(F);
            input.times(layer.gate, columns, gate, F);
            input.times(layer.up, columns, up, F);
            for (int64_t r = 0; r < R; ++r)
                gated<Kind>(gate + r * F + columns.begin, up + r * F + columns.begin, columns.end - columns.begin);
#pragma omp barrier
            input.set(gate, R, F, whole);
            columns = part(D);
            input.times(layer.down, columns, change, D);
            add_rows<Kind>(between, change, columns, R, D, after);
#pragma omp barrier
        }
        if (pass.final_norm) {
            const Number* last = static_cast<const Number*>(pass.states) + count * R * D;
            for (int64_t r = thread; r < R; r += members)
                norm_row<Kind>(last + r * D, static_cast<const Number*>(pass.final_norm), pass.eps, D,
                               static_cast<Number*>(pass.normed) + r * D);
        }
    }
}

}  // namespace headway
