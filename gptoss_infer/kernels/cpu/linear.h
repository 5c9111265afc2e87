// y = x W^T + bias + (x A^T) B^T, for few rows of x or many.

#pragma once

#include <algorithm>

#include "parallel.h"
#include "simd.h"

namespace gptoss {

constexpr int64_t ITEM_BYTES = 1 << 16;   // of weights that a thread takes at a time, at most
constexpr int64_t ROW_BLOCK = 64;         // rows of x whose sums are held before they are stored
constexpr int64_t SERIAL_WORK = 1 << 15;  // fewer multiplications are not worth waking another thread

// What rows of x are multiplied as: bf16 as it is where the CPU multiplies it, otherwise fp32.
#if defined(GPTOSS_BF16_DOT)
template <class T>
using Input = T;
#else
template <class T>
using Input = float;
#endif

// Pointers to rows, widened if need be.
template <class T>
class Rows {
  public:
    Rows(const T* x, int64_t count, int64_t k) : pointers_(scratch<const Input<T>*>(count)) {
        if constexpr (std::is_same_v<T, Input<T>>) {
            point_to(x, count, k);
        } else {
            wide_ = scratch<Input<T>>(count * k);
            pieces(count * k, [&](int64_t i, int n) { store_piece(&wide_[i], load_piece(x + i, n), n); });
            point_to(wide_.get(), count, k);
        }
    }
    const Input<T>* const* get() const { return pointers_.get(); }

  private:
    void point_to(const Input<T>* first, int64_t count, int64_t k) {
        for (int64_t m = 0; m < count; m++) pointers_[m] = first + m * k;
    }
    std::unique_ptr<const Input<T>*[], Free> pointers_;
    std::unique_ptr<Input<T>[], Free> wide_;
};

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Matrices as they lie in tensors of type T.
struct Affine {
    const void *weight, *bias;  // (N, K), (N) or null
    const void *a, *b;          // LoRA's (rank, K) and (N, rank), the latter times its scaling; unused if rank is 0
    int64_t n, rank;
};

// One result of `linear`: y (M, N), to which `residual` is added unless null; it may be y.
template <class Y>
struct Output {
    Affine affine;
    Y* y;
    const Y* residual;
};

// The LoRA products (M, rank) of rows of x, rounded as x is.
template <class T>
class LowRank {
  public:
    LowRank(const Input<T>* const* x, int64_t m, const T* a, int64_t rank, int64_t k) {
        int64_t stride = round_up(rank, ACCS);
        values_ = scratch<Input<T>>(m * rank);
        pointers_ = scratch<const Input<T>*>(m);
        auto sums = scratch<float>(m * stride);
        if (rank > 0) products(x, m, Dense<T>{a, k}, rank, k, sums.get(), stride);
        for (int64_t row = 0; row < m; row++) {
            pointers_[row] = &values_[row * rank];
            pieces(rank, [&](int64_t i, int n) {
                store_piece(&values_[row * rank + i], load_piece(&sums[row * stride + i], n), n);
            });
        }
    }
    const Input<T>* const* get() const { return pointers_.get(); }

  private:
    std::unique_ptr<Input<T>[], Free> values_;
    std::unique_ptr<const Input<T>*[], Free> pointers_;
};

// sums[m][n] += low[m] . row n of b.
template <class X, class Source>
inline void add_low_rank(const X* const* low, int64_t m, Source b, int64_t n, int64_t rank, float* sums, int64_t stride) {
    float* more = own_scratch<Use::LOW_RANK, float>(m * stride);
    products(low, m, b, n, rank, more, stride);
    for (int64_t i = 0; i < m * stride; i += LANES) store(sums + i, load(sums + i) + load(more + i));
}

// Rows [first, first + count) of one result.
template <class T, class Y>
void linear_tile(const Input<T>* const* x, const Input<T>* const* low, int64_t m, int64_t k, const Output<Y>& to,
                 int64_t first, int64_t count) {
    const Affine& affine = to.affine;
    const T *weight = (const T*)affine.weight, *bias = (const T*)affine.bias, *b = (const T*)affine.b;
    int64_t stride = round_up(count, ACCS);
    float* sums = own_scratch<Use::SUMS, float>(std::min(m, ROW_BLOCK) * stride);
    for (int64_t start = 0; start < m; start += ROW_BLOCK) {
        int64_t block = std::min(m - start, ROW_BLOCK);
        products(x + start, block, Dense<T>{weight + first * k, k}, count, k, sums, stride);
        if (affine.rank > 0) {
            Dense<T> part{b + first * affine.rank, affine.rank};
            add_low_rank(low + start, block, part, count, affine.rank, sums, stride);
        }
        for (int64_t r = 0; r < block; r++)
            pieces(count, [&](int64_t i, int n) {
                int64_t at = (start + r) * affine.n + first + i;
                Vec v = load_piece(sums + r * stride + i, n);
                if (bias != nullptr) v += load_piece(bias + first + i, n);
                if (to.residual != nullptr) v += load_piece(to.residual + at, n);
                store_piece(to.y + at, v, n);
            });
    }
}

// Several results of the same M rows of x.
template <class T, class Y>
void linear(const Rows<T>& x, int64_t m, int64_t k, std::initializer_list<Output<Y>> outputs, int threads) {
    int64_t total = 0;
    for (const auto& to : outputs) total += to.affine.n;
    int64_t share = std::min(ITEM_BYTES, total * k * (int64_t)sizeof(T) / (4 * threads)) / (k * (int64_t)sizeof(T));
    int64_t per_item = m >= 16 ? ACCS : std::max<int64_t>(round_up(share, ACCS), ACCS);
    if (m * total * k < SERIAL_WORK) threads = 1;
    std::vector<LowRank<T>> low;
    int64_t items = 0;
    for (const auto& to : outputs) {
        low.emplace_back(x.get(), m, (const T*)to.affine.a, to.affine.rank, k);
        items += (to.affine.n + per_item - 1) / per_item;
    }
    parallel(items, threads, [&](int64_t item) {
        const Output<Y>* to = outputs.begin();
        for (int64_t tiles; item >= (tiles = (to->affine.n + per_item - 1) / per_item); to++) item -= tiles;
        int64_t first = item * per_item;
        const LowRank<T>& own = low[to - outputs.begin()];
        linear_tile<T>(x.get(), own.get(), m, k, *to, first, std::min(per_item, to->affine.n - first));
    });
}

}  // namespace gptoss
