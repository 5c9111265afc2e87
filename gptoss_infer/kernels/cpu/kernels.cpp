// The functions that gptoss_infer.kernels.cpu calls with pointers into tensors. dtype: 0 is fp32, 1 is bf16.

#include "layers.h"

using namespace gptoss;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Calls f with a pointer whose type is that of the tensors.
template <class F>
void by_dtype(int dtype, F f) {
    if (dtype == 0) f((float*)nullptr);
    else f((bf16*)nullptr);
}

}  // namespace

// How bf16 is multiplied: 2 by AVX512_BF16, 1 widened to fp32.
EXPORT int gptoss_level() {
#if defined(GPTOSS_BF16_DOT)
    return 2;
#else
    return 1;
#endif
}

// Floats in a vector.
EXPORT int gptoss_lanes() { return LANES; }

EXPORT void gptoss_linear(int dtype, const void* x, int64_t m, int64_t k, const Affine* affine, void* y, int fp32_result,
                          int threads) {
    by_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        Rows<T> rows((const T*)x, m, k);
        if (fp32_result) linear<T, float>(rows, m, k, {{*affine, (float*)y, nullptr}}, threads);
        else linear<T, T>(rows, m, k, {{*affine, (T*)y, nullptr}}, threads);
    });
}

EXPORT void gptoss_experts(int dtype, const void* x, const int64_t* chosen, const float* weights, int64_t num_tokens,
                           int64_t top_k, int64_t num_experts, const Projection* gate_up, const Projection* down,
                           float alpha, float limit, void* out, int threads) {
    by_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        Rows<T> rows((const T*)x, num_tokens, gate_up->in);
        Experts<T>{chosen, weights, num_tokens, top_k, num_experts, *gate_up, *down, alpha, limit, nullptr, (T*)out, threads}
            .run(rows);
    });
}

EXPORT void gptoss_attention(int dtype, const void* q, const void* k, const void* v, const int64_t* sequences,
                             const int64_t* positions, void* keys, void* values, const Pages* pages, int64_t page_tokens,
                             const void* sinks, int64_t n, int64_t h, int64_t kv, int64_t d, int64_t window, void* out,
                             int threads) {
    by_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        Attention<T>{
            (const T*)q, (const T*)k, (const T*)v, sequences, positions, (T*)keys, (T*)values, pages->pages,
            pages->first_pages, pages->num_pages, page_tokens, (const T*)sinks, n, h, kv, d, window, (T*)out, threads,
        }.run();
    });
}

EXPORT void gptoss_rms_norm(int dtype, const void* x, const float* weight, float eps, int64_t n, int64_t c, void* out,
                            int threads) {
    by_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        rms_norm((const T*)x, weight, eps, n, c, (T*)out, threads);
    });
}

EXPORT void gptoss_rotate(int dtype, void* x, const float* cos, const float* sin, int64_t n, int64_t heads, int64_t d,
                          int threads) {
    by_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        rotate((T*)x, cos, sin, n, heads, d, threads);
    });
}

EXPORT void gptoss_top_k(const float* logits, int64_t n, int64_t e, int64_t k, int64_t* chosen, float* weights) {
    top_k(logits, n, e, k, chosen, weights);
}

EXPORT void gptoss_argmax(const float* x, int64_t n, int64_t v, int64_t* out, int threads) { argmax(x, n, v, out, threads); }

// Takes x (N, C) through all layers, in place.
EXPORT void gptoss_layers(int dtype, const Shape* shape, const Layer* layers, const Step* step, void* x, int threads) {
    by_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        Runner<T> runner(*shape, *step, threads);
        for (int64_t i = 0; i < shape->num_layers; i++) runner.run(layers[i], (T*)x);
    });
}
