// Work shared by torch's OpenMP threads, and what a thread keeps between calls.

#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

namespace gptoss {

// Runs f(item) for every item. Threads take the next one when they are done, so a thread that has to share its core does
// less; no result depends on who computed what.
template <class F>
inline void parallel(int64_t items, int threads, F f) {
    if (items < threads) threads = (int)items;
    if (threads <= 1) {
        for (int64_t i = 0; i < items; i++) f(i);
        return;
    }
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) f(i);
}

struct Free {
    void operator()(void* p) const { std::free(p); }
};

// Memory that is not cleared, aligned to cache lines.
template <class T>
inline std::unique_ptr<T[], Free> scratch(int64_t count) {
    void* p = std::aligned_alloc(64, (count * sizeof(T) / 64 + 1) * 64);
    if (p == nullptr) std::abort();
    return std::unique_ptr<T[], Free>(static_cast<T*>(p));
}

// Memory of this thread, for one use at a time each.
enum class Use { SUMS, LOW_RANK, WEIGHTS, RESULTS };

template <Use, class T>
inline T* own_scratch(int64_t count) {
    thread_local std::unique_ptr<T[], Free> memory;
    thread_local int64_t size = 0;
    if (size < count) memory = scratch<T>(size = count);
    return memory.get();
}

}  // namespace gptoss
