// The likeliest chain of tokens of heads with a Markov bias: each token adds a row to the logits of the next offset.
//
//     y_k = argmax_v (logits_k[v] + to_logits[v] . previous[y_(k-1)])
//
// K offsets, B rows of the batch, V vocabulary, R rank.

#pragma once

#include "products.hpp"

namespace headway {

struct Chain {
    const void* logits;     // [K, B, V]
    const void* previous;   // [V, R]
    const void* to_logits;  // [V, R]
    const int64_t* last;    // [B]: the token before the first offset
    int64_t* tokens;        // [B, K]
    int64_t count, batch, vocabulary, rank, threads;
};

struct Best {
    float value;
    int64_t token;
};

// What all threads of a region share while a chain is made.
template <class Kind>
struct ChainRoom {
    std::vector<typename Kind::Number> bias;
    std::vector<Best> bests;

    void fit(const Chain& chain) {
        bias.resize(static_cast<size_t>(chain.batch * chain.vocabulary));
        // Twice as many: a thread may be one offset ahead of those that still read.
        bests.resize(static_cast<size_t>(2 * chain.threads * chain.batch));
    }
};

// A thread's part; all threads of the region call it. Rank 0 means no bias.
template <class Kind>
void chain_part(const Chain& chain, ChainRoom<Kind>& room, int thread, int members) {
    using Number = typename Kind::Number;
    const int64_t B = chain.batch, V = chain.vocabulary, R = chain.rank;
    const Matrix matrix{chain.to_logits, nullptr, V};
    Number* const bias = room.bias.data();
    static thread_local Input<Kind> input;
    static thread_local std::vector<Number> states;
    static thread_local std::vector<int64_t> before;
    states.resize(static_cast<size_t>(B * R));
    before.assign(chain.last, chain.last + B);
    for (int64_t k = 0; k < chain.count; ++k) {
        for (int64_t b = 0; b < B && R; ++b)
            std::copy_n(static_cast<const Number*>(chain.previous) + before[b] * R, R, states.data() + b * R);
        if (R) input.set(states.data(), B, R);
        const Range own = share(V, thread, members, input.group());
        if (R) input.times(matrix, own, bias, V);
        Best* const level = room.bests.data() + (k % 2) * chain.threads * B;
        for (int64_t b = 0; b < B; ++b) {
            const Number* logits = static_cast<const Number*>(chain.logits) + (k * B + b) * V;
            Best best{-std::numeric_limits<float>::infinity(), own.begin};
            for (int64_t v = own.begin; v < own.end; ++v) {
                float value = Kind::value(logits[v]);
                if (R) value = Kind::value(Kind::number(value + Kind::value(bias[b * V + v])));
                if (value > best.value) best = {value, v};
            }
            level[thread * B + b] = best;
        }
#pragma omp barrier
        for (int64_t b = 0; b < B; ++b) {
            Best best = level[b];
            for (int t = 1; t < members; ++t)
                if (level[t * B + b].value > best.value) best = level[t * B + b];
            before[b] = best.token;
            if (thread == 0) chain.tokens[b * chain.count + k] = best.token;
        }
    }
}

template <class Kind>
void run_chain(const Chain& chain) {
    const int threads = static_cast<int>(chain.threads);
    static thread_local ChainRoom<Kind> own;
    own.fit(chain);
    ChainRoom<Kind>& room = own;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#if defined(_OPENMP)
        const int thread = omp_get_thread_num(), members = omp_get_num_threads();
#else
        const int thread = 0, members = 1;
#endif
        chain_part<Kind>(chain, room, thread, members);
    }
}

}  // namespace headway
