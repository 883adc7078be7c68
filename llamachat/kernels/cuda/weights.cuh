// How weights lie in memory and what they mean (weights.py packs them).
//
// Rows are contiguous, padded to 32 columns, in units of 16 bytes. 4 bits with a codebook: element
// k of a row is nibble k, a number in `book`. 4 bits otherwise: byte j of a word has element j of its
// eight in the low nibble and element 4 + j in the high one. 8 bits, floats: in order.
//
// The instruction that permutes bytes looks up four of eight entries by three bits each; where the
// fourth is set it gives the entry's sign, 0 or -1, instead. So a level is the sum of two look-ups,
// by a number and by that number with its fourth bit turned, in tables that allow for those signs:
// two permutations and two dot products for four weights. With many tokens the dot products cost
// more than a third permutation, which selects the one that counts.
#pragma once
#include "common.cuh"

enum Kind { kPlain4, kBook4, kPlain8, kFloat16, kBfloat16, kFloat32 };
constexpr int kKinds = 8;   // a form is a kind and these:
constexpr int kMin = 8;     // with minima; codes are not offset
constexpr int kFine = 16;   // groups of 16 columns rather than of 32 << shift

struct Part {
    const uint8_t* codes;
    const uint16_t* scales;  // float16 (rows, groups)
    const uint16_t* mins;    // the same, or null
    uint32_t book[4];        // 16 int8
    uint32_t summands[4];    // the same as two tables whose entries are added
    int64_t stride;          // bytes of a row
    float unit;              // of all values
    int rows;
    int units;               // of a row
    int groups;
    int shift;               // a group has 32 << shift columns
    int step;                // levels move by (n - 8) * step, n the lowest four bits of the scale
    int form;
    int first;               // its first block of rows in a grid
};

template <int FORM>
struct Form {
    static constexpr int kind = FORM % kKinds;
    static constexpr bool has_min = (FORM & kMin) != 0;
    static constexpr bool fine = (FORM & kFine) != 0;
    static constexpr bool is_float = kind >= kFloat16;
    static constexpr int per_unit = kind <= kBook4 ? 32 : kind == kPlain8 ? 16 : kind == kFloat32 ? 4 : 8;
    static constexpr int words = per_unit / 4;  // of int8 that a unit of codes becomes
};

// What lies below codes: a level is code + offset, for a group with this scale.
template <int FORM>
__device__ __forceinline__ int offset_of(const Part& p, uint32_t scale) {
    if (Form<FORM>::kind == kBook4) return (static_cast<int>(scale & 15) - 8) * p.step;
    if (Form<FORM>::kind == kPlain4) return Form<FORM>::has_min ? 0 : -8;
    return Form<FORM>::has_min ? 128 : 0;  // packed as code - 128
}

// Eight codes of 4 bits to int8: elements 0 to 3, and 4 to 7.
template <int FORM>
__device__ __forceinline__ void levels8(const Part& p, uint32_t word, int& low, int& high) {
    if (Form<FORM>::kind == kPlain4) {
        low = word & 0x0F0F0F0F;
        high = (word >> 4) & 0x0F0F0F0F;
        return;
    }
    const uint32_t index = word & 0x77777777;  // within either half of the book
    const uint32_t half = ((word >> 1) & 0x44444444) | 0x32103210;
    low = permute(permute(p.book[0], p.book[1], index), permute(p.book[2], p.book[3], index), half);
    high = permute(permute(p.book[0], p.book[1], index >> 16),
                   permute(p.book[2], p.book[3], index >> 16), half >> 16);
}

// The eight codes of a codebook as summands.
__device__ __forceinline__ void summands8(const Part& p, uint32_t word, int (&low)[2], int (&high)[2]) {
    const uint32_t turned = word ^ 0x88888888;
    low[0] = permute(p.summands[0], p.summands[1], word);
    low[1] = permute(p.summands[2], p.summands[3], turned);
    high[0] = permute(p.summands[0], p.summands[1], word >> 16);
    high[1] = permute(p.summands[2], p.summands[3], turned >> 16);
}

// Values of eight columns from `column`, a multiple of 8.
template <int FORM>
__device__ __forceinline__ void values8(const Part& p, int64_t row, int column, float (&out)[8]) {
    using F = Form<FORM>;
    const uint8_t* at = p.codes + row * p.stride;
    if constexpr (F::is_float) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if constexpr (F::kind == kFloat32) out[i] = reinterpret_cast<const float*>(at)[column + i];
            else {
                const uint32_t bits = reinterpret_cast<const uint16_t*>(at)[column + i];
                out[i] = F::kind == kFloat16 ? of_half(bits) : of_bfloat16(bits);
            }
        }
    } else {
        int low, high;
        if constexpr (F::kind == kPlain8) {
            const uint2 words = *reinterpret_cast<const uint2*>(at + column);
            low = words.x, high = words.y;
        } else {
            levels8<FORM>(p, *reinterpret_cast<const uint32_t*>(at + column / 2), low, high);
        }
        const int64_t group = row * p.groups + (F::fine ? column / 16 : (column / 32) >> p.shift);
        const uint32_t bits = p.scales[group];
        const float scale = of_half(bits);
        const float min = F::has_min ? of_half(p.mins[group]) : 0.0f;
        // A byte b as the float 2^23 + b is a permutation; converting it takes four times as long.
        const float zero = 8388608.0f + static_cast<float>(128 - offset_of<FORM>(p, bits));
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const uint32_t bytes = (i < 4 ? low : high) ^ 0x80808080;
            const float level = __uint_as_float(permute(bytes, 0x4B000000, 0x7440 | i % 4)) - zero;
            out[i] = p.unit * (scale * level + min);
        }
    }
}
