// The chosen experts of every token, straight from MXFP4: products, biases, SwiGLU, and the weighted sum.
//
// Legend: N tokens, k experts per token, M = N k rows sorted by expert, E experts, C hidden size, I intermediate size.

#pragma once

#include "linear.h"
#include "mxfp4.h"

namespace gptoss {

constexpr int64_t UNPACKED_ROWS = 4;  // up to so many rows of an expert, weights are decoded in registers
constexpr int64_t MOST_COLUMNS = 64;  // hidden values, or columns of the result, that a thread takes at a time

// One projection of all experts.
struct Projection {
    const uint8_t *blocks, *scales;  // (E, out, in / 32, 16), (E, out, in / 32)
    const void *bias, *a, *b;        // (E, out); LoRA's (E, rank, in) and (E, out, rank), as in Affine
    int64_t out, in, rank;
    Packed of(int64_t expert) const {
        int64_t groups = in / BLOCK, before = expert * out * groups;
        return {blocks + before * 16, scales + before, groups};
    }
};

// Rows sorted by expert, tokens in order within each.
struct Routing {
    struct Group {
        int64_t expert, first, count;
    };
    std::vector<Group> groups;  // experts with a token, ascending
    std::vector<int64_t> tokens;
    std::vector<float> weights;

    Routing(const int64_t* chosen, const float* of_choice, int64_t n, int64_t k, int64_t num_experts)
        : tokens(n * k), weights(n * k) {
        std::vector<int64_t> ends(num_experts + 1, 0);
        for (int64_t i = 0; i < n * k; i++) ends[chosen[i] + 1]++;
        for (int64_t e = 0; e < num_experts; e++) {
            if (ends[e + 1] > 0) groups.push_back({e, ends[e], ends[e + 1]});
            ends[e + 1] += ends[e];
        }
        for (int64_t i = 0; i < n * k; i++) {
            int64_t row = ends[chosen[i]]++;
            tokens[row] = i / k;
            weights[row] = of_choice[i];
        }
    }
};

// How many columns of `total` a thread takes at a time: many where few rows make each of them short, since memory is read
// fastest in long pieces; few where the sums of many rows have to be held.
inline int64_t columns_of_item(int64_t total, int64_t rows, int threads) {
    int64_t share = rows >= 16 ? ACCS : round_up(total / (4 * threads), ACCS);
    return std::max<int64_t>(ACCS, std::min(share, MOST_COLUMNS));
}

template <class T>
struct Experts {
    using X = Input<T>;
    const int64_t* chosen;   // (N, k)
    const float* of_choice;  // (N, k)
    int64_t num_tokens, top_k, num_experts;
    Projection gate_up, down;
    float alpha, limit;
    const T* residual;  // (N, C) or null: added; may be out
    T* out;             // (N, C)
    int threads;

    void run(const Rows<T>& x) const {
        Routing routing(chosen, of_choice, num_tokens, top_k, num_experts);
        int64_t num_rows = num_tokens * top_k, width = down.in;
        auto hidden = scratch<X>(num_rows * width);
        auto of_row = scratch<const X*>(num_rows), of_hidden = scratch<const X*>(num_rows);
        for (int64_t row = 0; row < num_rows; row++) {
            of_row[row] = x.get()[routing.tokens[row]];
            of_hidden[row] = &hidden[row * width];
        }
        int64_t num_groups = (int64_t)routing.groups.size();
        int64_t step = columns_of_item(num_groups * width, num_tokens, threads), tiles = (width + step - 1) / step;
        auto low = low_rank(routing, gate_up, of_row.get());
        parallel(num_groups * tiles, threads, [&](int64_t item) {
            int64_t first = item % tiles * step, count = std::min(width - first, step);
            up(routing.groups[item / tiles], first, count, of_row.get(), low[item / tiles].get(), hidden.get());
        });
        low = low_rank(routing, down, of_hidden.get());
        step = columns_of_item(down.out, num_tokens, threads);
        parallel((down.out + step - 1) / step, threads, [&](int64_t item) {
            sum(routing, item * step, std::min(down.out - item * step, step), of_hidden.get(), low);
        });
    }

    // The LoRA products of each group's rows; none without LoRA.
    std::vector<std::unique_ptr<LowRank<T>>> low_rank(const Routing& routing, const Projection& p, const X* const* x) const {
        std::vector<std::unique_ptr<LowRank<T>>> low(routing.groups.size());
        if (p.rank > 0) parallel((int64_t)low.size(), threads, [&](int64_t i) {
            const Routing::Group& group = routing.groups[i];
            const T* a = (const T*)p.a + group.expert * p.rank * p.in;
            low[i] = std::make_unique<LowRank<T>>(x + group.first, group.count, a, p.rank, p.in);
        });
        return low;
    }

    // Multiplies a group's rows of x with rows [first, first + n) of its expert, and calls use(row, count, sums, stride) for
    // blocks of them.
    template <class Done>
    void multiply(const Projection& p, const Routing::Group& group, const X* const* x, const LowRank<T>* low,
                  int64_t first, int64_t n, Done use) const {
        int64_t stride = round_up(n, ACCS);
        float* sums = own_scratch<Use::SUMS, float>(ROW_BLOCK * stride);
        Packed packed = p.of(group.expert).from(first);
        Dense<T> b{(const T*)p.b + (group.expert * p.out + first) * p.rank, p.rank};
        auto run = [&](auto source) {
            for (int64_t row = 0; row < group.count; row += ROW_BLOCK) {
                int64_t count = std::min(group.count - row, ROW_BLOCK);
                products(x + group.first + row, count, source, n, p.in, sums, stride);
                if (low != nullptr) add_low_rank(low->get() + row, count, b, n, p.rank, sums, stride);
                use(row, count, sums, stride);
            }
        };
#if defined(GPTOSS_BF16_DOT)
        if constexpr (std::is_same_v<X, bf16>)
            if (group.count <= UNPACKED_ROWS) return run(Unpacking{packed, codes<bf16>()});
#endif
        X* weights = own_scratch<Use::WEIGHTS, X>(n * p.in);
        for (int64_t row = 0; row < n; row++) packed.decode(row, weights + row * p.in);
        run(Dense<X>{weights, p.in});
    }

    // Fills hidden values [first, first + n) of one expert's rows. Gates and ups alternate in the projection.
    void up(const Routing::Group& group, int64_t first, int64_t n, const X* const* x, const LowRank<T>* low,
            X* hidden) const {
        const T* bias = (const T*)gate_up.bias + group.expert * gate_up.out + 2 * first;
        auto use = [&](int64_t row, int64_t count, const float* sums, int64_t stride) {
            for (int64_t r = 0; r < count; r++) {
                X* to = hidden + (group.first + row + r) * down.in + first;
                pieces(n, [&](int64_t i, int some) {
                    float gate[LANES] = {}, up[LANES] = {};
                    const float* pair = sums + r * stride + 2 * i;
                    for (int j = 0; j < some; j++) {
                        gate[j] = pair[2 * j] + to_float(bias[2 * (i + j)]);
                        up[j] = pair[2 * j + 1] + to_float(bias[2 * (i + j) + 1]);
                    }
                    store_piece(to + i, swiglu(load(gate), load(up)), some);
                });
            }
        };
        multiply(gate_up, group, x, low, 2 * first, 2 * n, use);
    }

    Vec swiglu(Vec gate, Vec up) const {
        gate = at_most(gate, limit);
        up = at_least(at_most(up, limit), -limit);
        return gate / (1.0f + exp(gate * -alpha)) * (up + 1.0f);
    }

    // Fills columns [first, first + n) of the result, experts added in ascending order.
    void sum(const Routing& routing, int64_t first, int64_t n, const X* const* hidden,
             const std::vector<std::unique_ptr<LowRank<T>>>& low) const {
        int64_t width = round_up(n, LANES);
        float* result = own_scratch<Use::RESULTS, float>(num_tokens * width);
        std::memset(result, 0, num_tokens * width * sizeof(float));
        for (size_t index = 0; index < routing.groups.size(); index++) {
            const Routing::Group& group = routing.groups[index];
            const T* bias = (const T*)down.bias + group.expert * down.out + first;
            auto use = [&](int64_t row, int64_t count, const float* sums, int64_t stride) {
                for (int64_t r = 0; r < count; r++) {
                    float* to = result + routing.tokens[group.first + row + r] * width;
                    float weight = routing.weights[group.first + row + r];
                    pieces(n, [&](int64_t i, int some) {
                        Vec value = load(sums + r * stride + i) + load_piece(bias + i, some);
                        store(to + i, load(to + i) + value * weight);
                    });
                }
            };
            multiply(down, group, hidden, low[index].get(), first, n, use);
        }
        for (int64_t token = 0; token < num_tokens; token++)
            pieces(n, [&](int64_t i, int some) {
                int64_t at = token * down.out + first + i;
                Vec v = load(result + token * width + i);
                if (residual != nullptr) v += load_piece(residual + at, some);
                store_piece(out + at, v, some);
            });
    }
};

}  // namespace gptoss
