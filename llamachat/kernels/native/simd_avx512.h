// AVX-512 (F, BW, DQ, VL), with or without VNNI, with VNNI and BF16.

#pragma once
#include <immintrin.h>

struct Avx512 {
    using F = __m512;
    using A = __m512i;
    using Codes = __m512i;
    using Bytes = __m512i;
    using Nibbles = __m512i;
    using Line = __m512i;
    static constexpr int kRegisters = 32;  // of 16 lanes

    static F zero() { return _mm512_setzero_ps(); }
    static F set(float x) { return _mm512_set1_ps(x); }
    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F abs(F a) { return _mm512_abs_ps(a); }
    static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F times_power_of_two(F a, F n) { return _mm512_scalef_ps(a, n); }
    // y, but 0 in lanes where a < b
    static F zero_where_less(F a, F b, F y) {
        return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ), y);
    }
    // x in the first n lanes, `rest` in the others
    static F first(int n, F x, F rest) {
        return _mm512_mask_mov_ps(rest, static_cast<__mmask16>(n >= 16 ? 0xFFFF : (1u << n) - 1), x);
    }
    static float sum(F x) {
        __m256 y = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
        __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
        z = _mm_add_ps(z, _mm_movehl_ps(z, z));
        return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
    }
    static float largest(F x) { return _mm512_reduce_max_ps(x); }

    static F load_i8(const int8_t* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }
    static F load_f16(const uint16_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static F low_bits(const uint16_t* p) {
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_cvtepu16_epi32(words), _mm512_set1_epi32(15)));
    }
    static F load_bf16(const uint16_t* p) {
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    // Nearest, ties to even.
    static void store_bf16(uint16_t* p, F x) {
#ifdef LC_AVX512BF16
        constexpr int kSubnormal = 0x20;  // the instruction would take them for zeros
        if (!_mm512_fpclass_ps_mask(x, kSubnormal))
            return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
#endif
        const __m512i bits = _mm512_castps_si512(x);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
        const __m512i quiet = _mm512_set1_epi32(0x400000);  // rounding could end a NaN
        const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        const __m512i kept = _mm512_srli_epi32(_mm512_mask_or_epi32(rounded, is_nan, bits, quiet), 16);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(kept));
    }
#ifdef LC_AVX512BF16
    using Pairs = __m512bh;
    static constexpr bool kPairs = true;
    static Pairs pairs(const uint16_t* a, const uint16_t* b) {
        const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i others = _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(16)), 16);
        const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
        const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
        const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
        return (Pairs)_mm512_permutexvar_epi16(_mm512_or_si512(lanes, others), both);
    }
    static Pairs pair(const uint16_t* x) {
        int32_t both;
        std::memcpy(&both, x, 4);
        return (Pairs)_mm512_set1_epi32(both);
    }
    static F dot_pairs(F sum, Pairs p, Pairs q) { return _mm512_dpbf16_ps(sum, p, q); }
#else
    static constexpr bool kPairs = false;
#endif
    // Nearest, ties to even; the values fit.
    static void store_i8(int8_t* p, F x) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
    }

    static F to_float(A a) { return _mm512_cvtepi32_ps(a); }
    static A set_int(int32_t x) { return _mm512_set1_epi32(x); }
    template <int kShift>
    static A shifted(A a) { return _mm512_slli_epi32(a, kShift); }

    static __m512i line(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static Codes low(__m512i line) { return _mm512_and_si512(line, _mm512_set1_epi8(15)); }
    static Codes high(__m512i line) { return low(_mm512_srli_epi16(line, 4)); }
    // The codebook's 16 entries in each 128-bit lane, biased like Bytes.
    static __m512i book(const int8_t* entries) {
        return bytes(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries))));
    }
    static Bytes lookup(__m512i book, Codes codes) { return _mm512_shuffle_epi8(book, codes); }

    static Nibbles nothing() { return _mm512_setzero_si512(); }
    static __m512i four(const int8_t* x) {
        int32_t word;
        std::memcpy(&word, x, 4);
        return _mm512_set1_epi32(word);
    }
#if defined(LC_AVX512VNNI) || defined(LC_AVX512BF16)
    static constexpr int kBias = 128;
    static constexpr int kTile = 6;
    static Bytes bytes(__m512i line) { return _mm512_xor_si512(line, _mm512_set1_epi8(-128)); }
    static A dot(A sum, Bytes w, const int8_t* x) { return _mm512_dpbusd_epi32(sum, w, four(x)); }
    static Nibbles dot_nibbles(Nibbles sums, Codes w, const int8_t* x) { return dot(sums, w, x); }
    static A total(Nibbles sums, A start) { return _mm512_add_epi32(sums, start); }
#else
    static constexpr int kBias = 0;
    static constexpr int kTile = 4;
    static Bytes bytes(__m512i line) { return line; }
    // |w| * (x with the sign of w): sums of two are at most 2 * 128 * 127 and fit 16 bits. |w| and the
    // mask are the same for every x, so they are computed once where a loop over tokens is unrolled.
    static A dot(A sum, Bytes w, const int8_t* x) {
        const __m512i plus = four(x);
        const __m512i either = _mm512_mask_sub_epi8(plus, _mm512_movepi8_mask(w), nothing(), plus);
        return total(_mm512_maddubs_epi16(_mm512_abs_epi8(w), either), sum);
    }
    // Sums of two in 16 bits, eight times: at most 8 * 2 * 15 * 127. Why they saturate: see simd_avx2.h.
    static Nibbles dot_nibbles(Nibbles sums, Codes w, const int8_t* x) {
        return _mm512_adds_epi16(sums, _mm512_maddubs_epi16(w, four(x)));
    }
    static A total(Nibbles sums, A start) {
        return _mm512_add_epi32(_mm512_madd_epi16(sums, _mm512_set1_epi16(1)), start);
    }
#endif
};
