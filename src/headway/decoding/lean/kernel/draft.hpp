// The likeliest draft of heads that share the unembedding, in one parallel region: norm, unembedding, chain.
//
//     logits_k = U norm(h_k[b, column_b]),   then the chain of chain.hpp
//
// K offsets, B rows of the batch, M positions of the pass that gave the heads' states, D width.

#pragma once

#include "chain.hpp"
#include "layers.hpp"

namespace headway {

struct Draft {
    const void* const* hidden;  // K addresses of [B, M, D]
    const int64_t* columns;     // [B]: where each row's draft begins
    const void* norm;           // [D], or null
    double eps;
    Matrix unembedding;
    Chain chain;  // without logits, which are made here
    int64_t positions, width;
};

template <class Kind>
void run_draft(const Draft& draft) {
    using Number = typename Kind::Number;
    const int64_t K = draft.chain.count, B = draft.chain.batch, D = draft.width, V = draft.chain.vocabulary;
    const int threads = static_cast<int>(draft.chain.threads);
    static thread_local std::vector<Number> shared;
    static thread_local ChainRoom<Kind> own_room;
    shared.resize(static_cast<size_t>(K * B * V));
    own_room.fit(draft.chain);
    Number* const logits = shared.data();
    ChainRoom<Kind>& room = own_room;
    Chain chain = draft.chain;
    chain.logits = logits;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#if defined(_OPENMP)
        const int thread = omp_get_thread_num(), members = omp_get_num_threads();
#else
        const int thread = 0, members = 1;
#endif
        static thread_local std::vector<Number> rows;
        static thread_local Input<Kind> input;
        rows.resize(static_cast<size_t>(K * B * D));
        for (int64_t k = 0; k < K; ++k)
            for (int64_t b = 0; b < B; ++b) {
                const Number* from =
                    static_cast<const Number*>(draft.hidden[k]) + (b * draft.positions + draft.columns[b]) * D;
                Number* to = rows.data() + (k * B + b) * D;
                if (draft.norm)
                    norm_row<Kind>(from, static_cast<const Number*>(draft.norm), draft.eps, D, to);
                else
                    std::copy_n(from, D, to);
            }
        input.set(rows.data(), K * B, D);
        input.times(draft.unembedding, share(V, thread, members, input.group()), logits, V);
#pragma omp barrier
        chain_part<Kind>(chain, room, thread, members);
    }
}

}  // namespace headway
