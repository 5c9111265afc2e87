// MXFP4 rows: 16 bytes and a scale byte for 32 values. Decoding is exact and equal to gptoss_infer.mxfp4.decode.

#pragma once

#include <cmath>

#include "simd.h"

namespace gptoss {

constexpr int BLOCK = 32;

// What each code is worth at each scale byte, twice: looking up by 5 bits then ignores the fifth.
template <class T>
struct Codes {
    alignas(64) T values[256][32];
    Codes() {
        const float magnitudes[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
        for (int scale = 0; scale < 256; scale++)
            for (int code = 0; code < 32; code++) {
                float factor = scale == 255 ? NAN : std::ldexp(1.0f, scale - 127);
                float value = magnitudes[code & 7] * factor;
                if (code & 8) value = -value;
                set(values[scale][code], value);
            }
    }
    static void set(float& to, float value) { to = value; }
    static void set(bf16& to, float value) {  // every finite value has a bf16
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        to.bits = (uint16_t)(bits >> 16);
    }
};

template <class T>
inline const T (&codes())[256][32] {
    static const Codes<T> table;
    return table.values;
}

inline void decode_block(const uint8_t* bytes, const float (&code)[32], float* out) {
#if defined(__AVX512F__)
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    __m512i low = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)bytes));
    __m512 table = _mm512_load_ps(code);
    __m512 even = _mm512_permutexvar_ps(low, table);  // looks at 4 bits only
    __m512 odd = _mm512_permutexvar_ps(_mm512_srli_epi32(low, 4), table);
    _mm512_storeu_ps(out, _mm512_permutex2var_ps(even, first, odd));
    _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps(even, _mm512_add_epi32(first, _mm512_set1_epi32(8)), odd));
#elif defined(__AVX2__)
    const __m256 table = _mm256_load_ps(code);  // of 3 bits; the fourth is the sign
    for (int half = 0; half < 2; half++) {
        __m256i low = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(bytes + 8 * half)));
        __m256i high = _mm256_srli_epi32(low, 4);
        auto look_up = [&](__m256i index) {
            __m256i sign = _mm256_slli_epi32(_mm256_and_si256(index, _mm256_set1_epi32(8)), 28);
            return _mm256_xor_ps(_mm256_permutevar8x32_ps(table, index), _mm256_castsi256_ps(sign));
        };
        __m256 even = look_up(low), odd = look_up(high);
        __m256 a = _mm256_unpacklo_ps(even, odd), b = _mm256_unpackhi_ps(even, odd);
        _mm256_storeu_ps(out + 16 * half, _mm256_permute2f128_ps(a, b, 0x20));
        _mm256_storeu_ps(out + 16 * half + 8, _mm256_permute2f128_ps(a, b, 0x31));
    }
#else
    for (int i = 0; i < BLOCK / 2; i++) {
        out[2 * i] = code[bytes[i] & 15];
        out[2 * i + 1] = code[bytes[i] >> 4];
    }
#endif
}

#if defined(GPTOSS_BF16_DOT)
inline __m512i decode_block(const uint8_t* bytes, const bf16 (&code)[32]) {
    // Dword i is byte i; or'ed with itself 12 bits higher, its lower word begins with the low nibble (of 5 bits that are
    // looked at, see Codes) and its upper word is the high one.
    __m512i spread = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)bytes));
    __m512i index = _mm512_or_si512(spread, _mm512_slli_epi32(spread, 12));
    return _mm512_permutexvar_epi16(index, _mm512_load_si512(code));
}

inline void decode_block(const uint8_t* bytes, const bf16 (&code)[32], bf16* out) {
    _mm512_storeu_si512(out, decode_block(bytes, code));
}
#endif

// Rows of one expert's projection.
struct Packed {
    const uint8_t* blocks;  // (rows, groups, 16)
    const uint8_t* scales;  // (rows, groups)
    int64_t groups;

    Packed from(int64_t row) const { return {blocks + row * groups * 16, scales + row * groups, groups}; }

    template <class T>
    void decode(int64_t row, T* out) const {
        const auto& table = codes<T>();
        const uint8_t *block = blocks + row * groups * 16, *scale = scales + row * groups;
        for (int64_t g = 0; g < groups; g++) decode_block(block + g * 16, table[scale[g]], out + g * BLOCK);
    }
};

#if defined(GPTOSS_BF16_DOT)
// Rows that are decoded in registers as they are multiplied: for few rows of x, where a copy would cost more.
struct Unpacking {
    using Weight = bf16;
    struct Row {
        const uint8_t *blocks, *scales;
        const bf16 (*codes)[32];
    };
    Packed packed;
    const bf16 (*codes)[32];
    Row row(int64_t n) const {
        Packed at = packed.from(n);
        return {at.blocks, at.scales, codes};
    }
    Unpacking from(int64_t n) const { return {packed.from(n), codes}; }
    static constexpr int ROWS = 4;
    static const void* address(Row row) { return row.blocks; }
    static constexpr int64_t bytes(int64_t k) { return k / 2; }
    template <class D>
    static __m512bh get(Row row, int64_t i) {
        return (__m512bh)decode_block(row.blocks + i / 2, row.codes[row.scales[i / BLOCK]]);
    }
    template <class D>
    static __m512bh get_some(Row row, int64_t i, int) {
        return get<D>(row, i);  // never called: rows are whole blocks
    }
};
#endif

}  // namespace gptoss
