// AVX2 with FMA and F16C, with or without AVX-VNNI: sixteen lanes are two registers.

#pragma once
#include <immintrin.h>

struct Avx2 {
    struct F {
        __m256 lo, hi;
    };
    struct Line {
        __m256i lo, hi;
    };
    using A = Line;
    using Codes = Line;
    using Bytes = Line;
    using Nibbles = Line;
    static constexpr int kTile = 2;
    static constexpr int kRegisters = 8;  // of 16 lanes
    static constexpr bool kPairs = false;

    static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static void store(float* p, F x) {
        _mm256_storeu_ps(p, x.lo);
        _mm256_storeu_ps(p + 8, x.hi);
    }
    static F add(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
    static F sub(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
    static F mul(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
    static F div(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
    static F max(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
    static F fma(F a, F b, F c) {
        return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
    }
    static F abs(F a) {
        const __m256 sign = _mm256_set1_ps(-0.0f);
        return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
    }
    static F round(F a) {
        constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        return {_mm256_round_ps(a.lo, kNearest), _mm256_round_ps(a.hi, kNearest)};
    }
    static F times_power_of_two(F a, F n) { return mul(a, {power_of_two(n.lo), power_of_two(n.hi)}); }
    // y, but 0 in lanes where a < b
    static F zero_where_less(F a, F b, F y) {
        return {_mm256_andnot_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), y.lo),
                _mm256_andnot_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ), y.hi)};
    }
    // x in the first n lanes, `rest` in the others
    static F first(int n, F x, F rest) {
        const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        const __m256i lo = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lanes);
        const __m256i hi = _mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), lanes);
        return {_mm256_blendv_ps(rest.lo, x.lo, _mm256_castsi256_ps(lo)),
                _mm256_blendv_ps(rest.hi, x.hi, _mm256_castsi256_ps(hi))};
    }
    static float sum(F x) {
        const __m256 y = _mm256_add_ps(x.lo, x.hi);
        __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
        z = _mm_add_ps(z, _mm_movehl_ps(z, z));
        return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
    }
    static float largest(F x) {
        const __m256 y = _mm256_max_ps(x.lo, x.hi);
        __m128 z = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
        z = _mm_max_ps(z, _mm_movehl_ps(z, z));
        return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
    }

    static F load_i8(const int8_t* p) {
        const __m128i bytes = load128(p);
        return to_float({_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))});
    }
    static F load_f16(const uint16_t* p) {
        return {_mm256_cvtph_ps(load128(p)), _mm256_cvtph_ps(load128(p + 8))};
    }
    static F low_bits(const uint16_t* p) {
        const __m256i mask = _mm256_set1_epi32(15);
        return to_float({_mm256_and_si256(_mm256_cvtepu16_epi32(load128(p)), mask),
                         _mm256_and_si256(_mm256_cvtepu16_epi32(load128(p + 8)), mask)});
    }
    static F load_bf16(const uint16_t* p) { return {widened(load128(p)), widened(load128(p + 8))}; }
    // Nearest, ties to even.
    static void store_bf16(uint16_t* p, F x) {
        const __m256i pairs = _mm256_packus_epi32(narrowed(x.lo), narrowed(x.hi));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(pairs, 0xD8));
    }
    // Nearest, ties to even; the values fit.
    static void store_i8(int8_t* p, F x) {
        const __m256i pairs = _mm256_packs_epi32(_mm256_cvtps_epi32(x.lo), _mm256_cvtps_epi32(x.hi));
        const __m256i words = _mm256_permute4x64_epi64(pairs, 0xD8);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                         _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
    }

    static F to_float(A a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
    static A set_int(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
    template <int kShift>
    static A shifted(A a) {
        return {_mm256_slli_epi32(a.lo, kShift), _mm256_slli_epi32(a.hi, kShift)};
    }

    static Line line(const uint8_t* p) {
        const __m256i* halves = reinterpret_cast<const __m256i*>(p);
        return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
    }
    static Codes low(Line line) {
        const __m256i mask = _mm256_set1_epi8(15);
        return {_mm256_and_si256(line.lo, mask), _mm256_and_si256(line.hi, mask)};
    }
    static Codes high(Line line) {
        return low({_mm256_srli_epi16(line.lo, 4), _mm256_srli_epi16(line.hi, 4)});
    }
    // The codebook's 16 entries in each 128-bit lane.
    static Line book(const int8_t* entries) {
        const __m256i table = _mm256_broadcastsi128_si256(load128(entries));
        return bytes({table, table});
    }
    static Bytes lookup(Line book, Codes codes) {
        return {_mm256_shuffle_epi8(book.lo, codes.lo), _mm256_shuffle_epi8(book.hi, codes.hi)};
    }
    static Nibbles nothing() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }

#ifdef LC_AVXVNNI
    static constexpr int kBias = 128;
    static Bytes bytes(Line line) { return {biased(line.lo), biased(line.hi)}; }
    static A dot(A sum, Bytes w, const int8_t* x) {
        const __m256i four = broadcast(x);
        return {_mm256_dpbusd_avx_epi32(sum.lo, w.lo, four), _mm256_dpbusd_avx_epi32(sum.hi, w.hi, four)};
    }
    static Nibbles dot_nibbles(Nibbles sums, Codes w, const int8_t* x) { return dot(sums, w, x); }
    static A total(Nibbles sums, A start) { return added(sums, start); }
#else
    static constexpr int kBias = 0;
    static Bytes bytes(Line line) { return line; }
    // |w| * (x with the sign of w): sums of two are at most 2 * 128 * 127 and fit 16 bits. |w| is the
    // same for every x, so it is computed once where a loop over tokens is unrolled.
    static A dot(A sum, Bytes w, const int8_t* x) {
        const __m256i four = broadcast(x);
        const __m256i lo = _mm256_maddubs_epi16(_mm256_abs_epi8(w.lo), _mm256_sign_epi8(four, w.lo));
        const __m256i hi = _mm256_maddubs_epi16(_mm256_abs_epi8(w.hi), _mm256_sign_epi8(four, w.hi));
        return total({lo, hi}, sum);
    }
    // Sums of two in 16 bits, eight times: at most 8 * 2 * 15 * 127. They are not to saturate, but GCC
    // makes a tree of plain additions, for which there are not enough registers.
    static Nibbles dot_nibbles(Nibbles sums, Codes w, const int8_t* x) {
        const __m256i four = broadcast(x);
        return {_mm256_adds_epi16(sums.lo, _mm256_maddubs_epi16(w.lo, four)),
                _mm256_adds_epi16(sums.hi, _mm256_maddubs_epi16(w.hi, four))};
    }
    static A total(Nibbles sums, A start) {
        const __m256i ones = _mm256_set1_epi16(1);
        return added({_mm256_madd_epi16(sums.lo, ones), _mm256_madd_epi16(sums.hi, ones)}, start);
    }
#endif

  private:
    static __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
    static __m256i broadcast(const int8_t* x) {
        int32_t word;
        std::memcpy(&word, x, 4);
        return _mm256_set1_epi32(word);
    }
    static A added(A a, A b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
    static __m256i biased(__m256i bytes) { return _mm256_xor_si256(bytes, _mm256_set1_epi8(-128)); }
    static __m256 power_of_two(__m256 n) {  // -126 <= n <= 127
        const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
        return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
    }
    static __m256 widened(__m128i bf16) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16));
    }
    static __m256i narrowed(__m256 x) {  // to bfloat16, in the lower half of each lane
        const __m256i bits = _mm256_castps_si256(x);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
        const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));  // rounding could end a NaN
        const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    }
};
