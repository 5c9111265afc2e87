// Vectors of floats, and dot products of several rows with several rows.
//
// Two levels, chosen by the compiler's flags: AVX512_BF16 multiplies bf16 by bf16 as they lie; everything else (fp32, and
// bf16 on CPUs without it) is written with the compiler's portable vectors, 16, 8 or 4 floats wide.
//
// Every sum over K has one order, whatever the number of rows, threads or tiles: LANES partial sums in the order of K,
// then a tree that adds lane i + w to lane i for w = LANES / 2, ..., 1. A row's result is the same bits in any batch.
//
// Legend: M rows of x, N rows of the weights (outputs), K features, ACCS sums that are kept in registers at a time.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace gptoss {

using bf16 = struct Bf16 { uint16_t bits; };

#if defined(__AVX512F__)
constexpr int LANES = 16, ACCS = 16;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int LANES = 8, ACCS = 8;
#else
constexpr int LANES = 4, ACCS = 8;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

inline Vec splat(float value) { return value - Vec{}; }

inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline Vec load(const bf16* p) {
    Halves h;
    std::memcpy(&h, p, sizeof h);
    return (Vec)(__builtin_convertvector(h, Bits) << 16);
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// Rounds to nearest, ties to even; NaN stays NaN.
inline void store(bf16* p, Vec v) {
    Bits bits = (Bits)v;
    Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    Bits is_nan = (Bits)(v != v);
    Halves h = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0), Halves);
    std::memcpy(p, &h, sizeof h);
}

// The first n < LANES elements, zeros behind them.
template <class T>
inline Vec load_some(const T* p, int n) {
    T padded[LANES] = {};
    std::memcpy(padded, p, n * sizeof(T));
    return load(padded);
}

template <class T>
inline void store_some(T* p, Vec v, int n) {
    T padded[LANES];
    store(padded, v);
    std::memcpy(p, padded, n * sizeof(T));
}

// Calls f(i, n) for pieces of [0, count) that are LANES long, the last one perhaps shorter.
template <class F>
inline void pieces(int64_t count, F f) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) f(i, LANES);
    if (i < count) f(i, (int)(count - i));
}

template <class T>
inline Vec load_piece(const T* p, int n) { return n == LANES ? load(p) : load_some(p, n); }

template <class T>
inline void store_piece(T* p, Vec v, int n) { n == LANES ? store(p, v) : store_some(p, v, n); }

inline float sum(Vec v) {
    float a[LANES];
    store(a, v);
    for (int w = LANES / 2; w > 0; w /= 2)
        for (int i = 0; i < w; i++) a[i] += a[i + w];
    return a[0];
}

inline float largest(Vec v) {
    float a[LANES];
    store(a, v);
    for (int w = LANES / 2; w > 0; w /= 2)
        for (int i = 0; i < w; i++) a[i] = a[i] > a[i + w] ? a[i] : a[i + w];
    return a[0];
}

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// NaN stays NaN.
inline Vec at_most(Vec v, float bound) { return v > bound ? splat(bound) : v; }
inline Vec at_least(Vec v, float bound) { return v < bound ? splat(bound) : v; }

// exp to about 2 units in the last place: 2^n times the Taylor series of the rest, |rest| <= ln(2) / 2. Below -87.3 it is
// 0, above 88 as at 88.
inline Vec exp(Vec x) {
    Vec clamped = at_least(at_most(x, 88.0f), -87.3f);
    const float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which its last bits then hold
    Vec shifted = clamped * 1.44269504f + MAGIC;
    Vec n = shifted - MAGIC;
    Vec r = clamped - n * 0.693359375f;  // ln 2 in two parts, the first of few bits
    r = r + n * 2.12194440e-4f;
    Vec p = splat(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    Vec result = (Vec)((Ints)p + (((Ints)shifted - (Ints)splat(MAGIC)) << 23));
    result = (Vec)((Bits)result & ~(Bits)(x < -87.3f));
    return x != x ? x : result;
}

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) {
    uint32_t bits = (uint32_t)v.bits << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

// How rows of x (type X) meet rows of weights (type W), STEP elements at a time.
template <class X, class W>
struct Dot {
    static constexpr int STEP = LANES;
    using Operand = Vec;
    template <class T>
    static Operand get(const T* p) { return load(p); }
    template <class T>
    static Operand get_some(const T* p, int n) { return load_some(p, n); }
    static void add(Vec& sum, Operand x, Operand w) { sum += x * w; }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define GPTOSS_BF16_DOT 1
template <>
struct Dot<bf16, bf16> {
    static constexpr int STEP = 32;
    using Operand = __m512bh;
    static Operand get(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static Operand get_some(const bf16* p, int n) {
        return (__m512bh)_mm512_maskz_loadu_epi16((1u << n) - 1, p);
    }
    static void add(Vec& sum, Operand x, Operand w) { sum = (Vec)_mm512_dpbf16_ps((__m512)sum, x, w); }
};
#endif

constexpr int64_t AHEAD_BYTES = 2048;  // how much further than the next rows is fetched: the time that memory takes

// Rows of weights that lie in memory as they are multiplied.
template <class W>
struct Dense {
    using Weight = W;
    using Row = const W*;
    const W* first;
    int64_t stride;
    Row row(int64_t n) const { return first + n * stride; }
    Dense from(int64_t n) const { return {row(n), stride}; }
    static constexpr int ROWS = 1;  // that a single row of x meets at a time
    static const void* address(Row row) { return row; }
    static constexpr int64_t bytes(int64_t k) { return k * (int64_t)sizeof(W); }
    template <class D>
    static typename D::Operand get(Row row, int64_t i) { return D::get(row + i); }
    template <class D>
    static typename D::Operand get_some(Row row, int64_t i, int n) { return D::get_some(row + i, n); }
};

// The sums of ACCS vectors, in their order.
__attribute__((always_inline)) inline void sums(const Vec (&accs)[ACCS], float* out) {
#if defined(__AVX512F__)
    __m512 halves[8], quarters[4], pairs[2];
    auto fold = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    };
    for (int t = 0; t < 4; t++) {
        halves[2 * t] = fold((__m512)accs[t], (__m512)accs[4 + t]);
        halves[2 * t + 1] = fold((__m512)accs[8 + t], (__m512)accs[12 + t]);
    }
    for (int t = 0; t < 4; t++) {
        __m512 a = halves[2 * t], b = halves[2 * t + 1];
        quarters[t] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    for (int t = 0; t < 2; t++) {
        __m512d a = _mm512_castps_pd(quarters[2 * t]), b = _mm512_castps_pd(quarters[2 * t + 1]);
        pairs[t] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    __m512 a = pairs[0], b = pairs[1];
    _mm512_storeu_ps(out, _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd)));
#else
    for (int i = 0; i < ACCS; i++) out[i] = sum(accs[i]);
#endif
}

// out[m * stride + n] = x[m] . row n of w, for MR rows of x and all rows of w. Writes ACCS / MR values at a time, so up
// to that many beyond n.
//
// Weights have to be asked for in the order in which they lie: several rows at a time were read at a third of the memory's
// speed. So a single row of x meets one row after the other, or a few that take time to decode, and wherever there are
// several, those to come are fetched in order.
template <int MR, class X, class Source>
inline void products_of(const X* const* x, Source w, int64_t n, int64_t k, float* out, int64_t stride) {
    using D = Dot<X, typename Source::Weight>;
    constexpr int NR = ACCS / MR, GROUP = MR == 1 ? Source::ROWS : NR < 4 ? NR : 4;
    constexpr int64_t FETCHED = GROUP * Source::bytes(D::STEP);
    for (int64_t first = 0; first < n; first += NR) {
        Vec accs[ACCS];
        for (int g = 0; g < NR; g += GROUP) {
            typename Source::Row rows[GROUP];
            for (int j = 0; j < GROUP; j++) rows[j] = w.row(first + g + j < n ? first + g + j : n - 1);
            const char* ahead = (const char*)Source::address(rows[0]) + GROUP * Source::bytes(k) + AHEAD_BYTES;
            Vec part[MR][GROUP] = {};
            int64_t i = 0;
            for (; i + D::STEP <= k; i += D::STEP) {
                if constexpr (GROUP > 1) {
                    for (int64_t b = 0; b < FETCHED; b += 64) __builtin_prefetch(ahead + b, 0, 2);  // into the second cache
                    ahead += FETCHED;
                }
                typename D::Operand xs[MR];
                for (int m = 0; m < MR; m++) xs[m] = D::get(x[m] + i);
                for (int j = 0; j < GROUP; j++) {
                    typename D::Operand ws = Source::template get<D>(rows[j], i);
                    for (int m = 0; m < MR; m++) D::add(part[m][j], xs[m], ws);
                }
            }
            if (i < k)
                for (int j = 0; j < GROUP; j++) {
                    typename D::Operand ws = Source::template get_some<D>(rows[j], i, (int)(k - i));
                    for (int m = 0; m < MR; m++) D::add(part[m][j], D::get_some(x[m] + i, (int)(k - i)), ws);
                }
            for (int m = 0; m < MR; m++)
                for (int j = 0; j < GROUP; j++) accs[m * NR + g + j] = part[m][j];
        }
        alignas(64) float values[ACCS];
        sums(accs, values);
        for (int m = 0; m < MR; m++) std::memcpy(out + m * stride + first, values + m * NR, NR * sizeof(float));
    }
}

// As above for m rows of x; `stride` is at least n rounded up to ACCS. ACCS rows of weights stay in the nearest cache while
// all of x passes by.
template <class X, class Source>
inline void products(const X* const* x, int64_t m, Source w, int64_t n, int64_t k, float* out, int64_t stride) {
    for (int64_t first = 0; first < n; first += ACCS) {
        Source some = w.from(first);
        int64_t count = n - first < ACCS ? n - first : ACCS, i = 0;
        float* to = out + first;
        for (; i + 4 <= m; i += 4) products_of<4>(x + i, some, count, k, to + i * stride, stride);
        for (; i + 2 <= m; i += 2) products_of<2>(x + i, some, count, k, to + i * stride, stride);
        if (i < m) products_of<1>(x + i, some, count, k, to + i * stride, stride);
    }
}

}  // namespace gptoss
