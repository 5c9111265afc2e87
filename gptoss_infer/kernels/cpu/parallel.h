// Work shared by torch's OpenMP threads, and what a thread keeps between calls.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

namespace gptoss {

struct alignas(64) Counter {
    std::atomic<int64_t> next;
};

// Runs f(item) for every item. Each thread goes through a range of its own, so that it reads memory in order, and then
// takes what is left of others': a thread that has to share its core does less. No result depends on who computed what.
template <class F>
inline void parallel(int64_t items, int threads, F f) {
    constexpr int MOST = 256;
    threads = (int)std::min<int64_t>({items, threads, MOST});
    if (threads <= 1) {
        for (int64_t i = 0; i < items; i++) f(i);
        return;
    }
    Counter counters[MOST];
    for (int r = 0; r < threads; r++) counters[r].next = items * r / threads;
    std::atomic<int> started{0};
#pragma omp parallel num_threads(threads)
    for (int own = started++, turn = 0; turn < threads; turn++) {
        int r = (own + turn) % threads;
        int64_t end = items * (r + 1) / threads;
        for (int64_t i; (i = counters[r].next.fetch_add(1, std::memory_order_relaxed)) < end;) f(i);
    }
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
