// Packed weights times activations by tensor cores: a box of 32 rows by 128 bytes of codes, as a copy
// brings it to shared memory, times up to 8 tokens, by one warp.
//
// Each group of 32 columns is one multiplication of integers for 16 rows; the sum begins with the
// number whose bits, read as a float, are 3 * 2^22, so that it becomes a float without a conversion.
// Which column of a group is which of the instruction's does not matter as long as weights and
// activations agree: lane c of four has word c of 16 bytes, eight columns of 4 bits.
#pragma once
#include "linear.cuh"

constexpr int kBoxRows = 32, kBoxBytes = 128, kBoxSize = kBoxRows * kBoxBytes;
constexpr int kColumns = TOKENS == 1 ? 1 : 2;  // tokens whose sums a lane has
constexpr int kMagic = 0x4B400000;
constexpr float kMagicFloat = 12582912.0f;

template <int FORM>
struct Box {
    static constexpr bool is_float = Form<FORM>::is_float;
    static constexpr bool is_four = Form<FORM>::per_unit == 32;
    static constexpr int blocks = is_float ? 2 : is_four ? 8 : 4;  // of activations
    static constexpr int table_bytes = is_four ? 64 : 32;          // of a row's scales, in a stage
    // Codes without minima are multiplied as 16 * (code - 8).
    static constexpr bool is_signed = Form<FORM>::kind == kPlain4 && !Form<FORM>::has_min;
    static constexpr bool has_sums = Form<FORM>::has_min || Form<FORM>::kind == kBook4;
};

// Rows lane / 4 + 8 i of 32; each as the lane's tokens have it.
struct Sums {
    float of[4][kColumns];
};

// Activations as a lane reads them: of token lane / 4 of eight, and what belongs to its sums. Columns
// of the multiplication that no token has repeat the last one.
struct Feed {
    const uint8_t* codes;
    const float* values;
    const float* scales[kColumns];
    const int* sums[kColumns];
    int blocks;

    template <class Source>
    __device__ Feed(const Acts& x, int tokens, Source source) : blocks(x.blocks) {
        const int lane = threadIdx.x % kWarp;
        const int64_t from = static_cast<int64_t>(source(min(lane / 4, tokens - 1))) * blocks;
        codes = x.codes + 2 * from * 16;
        values = x.values + from * kBlock;
        for (int i = 0; i < kColumns; ++i) {
            const int64_t to = static_cast<int64_t>(source(min(lane % 4 * 2 + i, tokens - 1))) * blocks;
            scales[i] = x.scales + to;
            sums[i] = x.sums + to;
        }
    }
};

// Whoever has waited for other blocks (`Grid`) sees what they wrote, in the first cache too.
struct Span {  // four blocks, as a lane gives them to the multiplication
    uint32_t codes[4][2];
    float4 scales[kColumns];
    int4 sums[kColumns];
};

template <int FORM>
__device__ __forceinline__ Span read_span(const Feed& x, int first) {
    const int c = threadIdx.x % 4, half = x.blocks * 16;  // of a token's codes
    const uint8_t* codes = x.codes + first * 16 + (Box<FORM>::is_four ? c / 2 * half + c % 2 * 8 : c * 4);
    Span span;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const uint8_t* at = codes + j * 16;
        if constexpr (Box<FORM>::is_four) {
            const uint2 both = __ldca(reinterpret_cast<const uint2*>(at));
            span.codes[j][0] = both.x, span.codes[j][1] = both.y;
        } else {
            span.codes[j][0] = __ldca(reinterpret_cast<const uint32_t*>(at));
            span.codes[j][1] = __ldca(reinterpret_cast<const uint32_t*>(at + half));
        }
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
        span.scales[i] = __ldca(reinterpret_cast<const float4*>(x.scales[i] + first));
        if (Box<FORM>::has_sums) span.sums[i] = __ldca(reinterpret_cast<const int4*>(x.sums[i] + first));
    }
    return span;
}

// Entry j of four.
template <class T>
__device__ __forceinline__ auto entry(const T& four, int j) -> decltype(four.x) {
    return j == 0 ? four.x : j == 1 ? four.y : j == 2 ? four.z : four.w;
}

// Where unit `unit` of a row lies: the copy permutes the units of a row by its number.
__device__ __forceinline__ const uint8_t* unit_at(const uint8_t* box, int row, int unit) {
    return box + row * kBoxBytes + ((unit ^ (row & 7)) << 4);
}

// Group `j` of 16 rows from 16 * `tile`; a codebook's levels are two summands.
template <int FORM>
struct Levels {
    static constexpr int n = Form<FORM>::kind == kBook4 ? 2 : 1;
    uint32_t of[n][2][4];  // by tile
};

template <int FORM>
__device__ __forceinline__ Levels<FORM> read_levels(const Part& p, const uint8_t* box, int j) {
    const int lane = threadIdx.x % kWarp;
    Levels<FORM> levels;
    if constexpr (!Box<FORM>::is_four) {
#pragma unroll
        for (int tile = 0; tile < 2; ++tile)
            load_matrices(unit_at(box, 16 * tile + lane % 16, 2 * j + lane / 16), levels.of[0][tile]);
    } else {
        uint32_t words[4];
        load_matrices(unit_at(box, lane, j), words);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int tile = i / 2, low = i % 2, high = low + 2;
            if constexpr (Form<FORM>::kind == kBook4) {
                int lows[2], highs[2];
                summands8(p, words[i], lows, highs);
#pragma unroll
                for (int k = 0; k < 2; ++k)
                    levels.of[k][tile][low] = lows[k], levels.of[k][tile][high] = highs[k];
            } else if constexpr (Box<FORM>::is_signed) {
                levels.of[0][tile][low] = flip_and_keep(words[i] << 4, 0x80808080, 0xF0F0F0F0);
                levels.of[0][tile][high] = flip_and_keep(words[i], 0x80808080, 0xF0F0F0F0);
            } else {
                levels.of[0][tile][low] = words[i] & 0x0F0F0F0F;
                levels.of[0][tile][high] = (words[i] >> 4) & 0x0F0F0F0F;
            }
        }
    }
    return levels;
}

struct Table {  // scales or minima of four groups, float16, of a lane's four rows
    uint2 of[4];
};

__device__ __forceinline__ Table read_table(const uint8_t* table, int row_bytes) {
    Table read;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = threadIdx.x % kWarp / 4 + 8 * i;
        read.of[i] = *reinterpret_cast<const uint2*>(table + row * row_bytes);
    }
    return read;
}

__device__ __forceinline__ float half_of(const uint2& four, int j) {
    const float2 two = of_halves(j < 2 ? four.x : four.y);
    return j % 2 ? two.y : two.x;
}

// What is added to a dot product, beside `kMagic`: the offset of codes times the sum of activations.
template <int FORM>
__device__ __forceinline__ int start_of(const Part& p, const uint2& scales, int j, int sum) {
    if (Form<FORM>::kind == kBook4) {  // see `offset_of`
        const uint32_t word = j < 2 ? scales.x : scales.y;
        const int number = (j % 2 ? word >> 16 : word) & 15, step = p.step * sum;
        return kMagic - 8 * step + number * step;
    }
    return kMagic + (Box<FORM>::is_signed ? 0 : offset_of<FORM>(p, 0) * sum);
}

// Four groups from group `first` of the box, whose scales and minima are these.
template <int FORM>
__device__ __forceinline__ void multiply_span(
    const Part& p, const uint8_t* box, const uint8_t* scales, const uint8_t* mins, int first,
    const Span& x, Sums& sums) {
    const Table scale = read_table(scales, Box<FORM>::table_bytes);
    Table min{};
    if (Form<FORM>::has_min) min = read_table(mins, Box<FORM>::table_bytes);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const Levels<FORM> levels = read_levels<FORM>(p, box, first + j);
        int sum[kColumns] = {};
#pragma unroll
        for (int i = 0; i < kColumns; ++i)
            if (Box<FORM>::has_sums) sum[i] = sum_halves(entry(x.sums[i], j));
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
            int start[4], dots[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                start[i] = start_of<FORM>(p, scale.of[2 * tile + i / 2], j, sum[i % 2 % kColumns]);
            multiply_bytes(levels.of[0][tile], x.codes[j], start, dots);
            if constexpr (Levels<FORM>::n == 2) multiply_bytes(levels.of[1][tile], x.codes[j], dots, dots);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (i % 2 >= kColumns) continue;
                const int row = 2 * tile + i / 2, column = i % 2;
                const float of_x = entry(x.scales[column], j);
                float& to = sums.of[row][column];
                to = fmaf(__int_as_float(dots[i]) - kMagicFloat, half_of(scale.of[row], j) * of_x, to);
                if (Form<FORM>::has_min)
                    to = fmaf(half_of(min.of[row], j), static_cast<float>(sum[column]) * of_x, to);
            }
        }
    }
}

// Two blocks of bfloat16: an activation is the sum of two, which leaves an error of 2^-17.
__device__ __forceinline__ void multiply_floats(const uint8_t* box, const Feed& x, int first, Sums& sums) {
    const int lane = threadIdx.x % kWarp;
    float products[2][4] = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) {  // 16 columns
        uint32_t high[2], low[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const float* at = x.values + first * kBlock + j * 16 + k * 8 + lane % 4 * 2;
            const float2 v = __ldca(reinterpret_cast<const float2*>(at));
            high[k] = pack_bfloat16(v.x, v.y);
            low[k] = pack_bfloat16(v.x - of_bfloat16(high[k] & 0xFFFF), v.y - of_bfloat16(high[k] >> 16));
        }
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
            uint32_t weights[4];
            load_matrices(unit_at(box, 16 * tile + lane % 16, 2 * j + lane / 16), weights);
            multiply_bfloat16(products[tile], weights, high);
            multiply_bfloat16(products[tile], weights, low);
        }
    }
#pragma unroll
    for (int row = 0; row < 4; ++row) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) sums.of[row][i] += products[row / 2][row % 2 * 2 + i];
    }
}
