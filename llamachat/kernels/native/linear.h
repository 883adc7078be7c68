// y = W x for packed weights: activations are brought to 8 bits once, then panels times tiles.
//
// Every output is one chain of float operations in the order of its row's blocks, whatever the
// number of tokens or threads: a token's result does not depend on its company.

#pragma once
#include "panels.h"
#include "pool.h"
#include "simd.h"

constexpr int64_t kActBytes = 48;  // of a token's block, see Acts
constexpr int64_t kAhead = 512;   // bytes, that lines are fetched before they are needed
constexpr int64_t kShortTokens = 16;
constexpr int64_t kUnitBytes = 32 << 10;  // of weights that a unit of work reads for few tokens

// One block of a tile of n tokens at 8 bits, x = d q:
//   int8 q[n][32], float d[n], int32 minus_sum[n] (of q), int32 minus_first[n] (of the first 16),
//   float d_sum[n] (d times the sum of q)
struct Acts {
    uint8_t* base;
    int64_t n;

    int8_t* q(int64_t t) const { return reinterpret_cast<int8_t*>(base) + t * kBlock; }
    float& d(int64_t t) const { return reinterpret_cast<float*>(base + n * kBlock)[t]; }
    int32_t& minus_sum(int64_t t) const { return reinterpret_cast<int32_t*>(base + n * (kBlock + 4))[t]; }
    int32_t& minus_first(int64_t t) const { return reinterpret_cast<int32_t*>(base + n * (kBlock + 8))[t]; }
    float& d_sum(int64_t t) const { return reinterpret_cast<float*>(base + n * (kBlock + 12))[t]; }
};

// Two panels of one form times a tile of tokens: out (2, N, 16).
struct TileArgs {
    Panel panels[2];
    const Panels* part;
    const uint8_t* acts;  // blocks of Acts
    const float* x;       // (N, stride), for float panels
    int64_t stride;
    float* out;
};
using TileFunction = void (*)(const TileArgs&);

enum Multipliers { kNibbles, kBook, kSigned };  // codes as they are, looked up, or signed bytes

// The sums of half a block or a whole one: `kLines` lines of codes from `line` on, 4 or 8 columns each.
template <class V, Multipliers kKind, int kLines, int N>
inline __attribute__((always_inline)) void dot_lines(
    const uint8_t* const (&line)[2], const int8_t* const (&x)[N], const typename V::A (&start)[N],
    [[maybe_unused]] const typename V::Line& book, typename V::A (&sums)[2][N]) {
    if constexpr (kKind == kNibbles) {
        typename V::Nibbles partial[2][N];
        for (auto& row : partial)
            for (auto& sum : row) sum = V::nothing();
#pragma GCC unroll 4
        for (int j = 0; j < kLines; ++j)
#pragma GCC unroll 2
            for (int r = 0; r < 2; ++r) {
                const auto both = V::line(line[r] + 64 * j);
                const auto low = V::low(both), high = V::high(both);
#pragma GCC unroll 8
                for (int t = 0; t < N; ++t) {
                    partial[r][t] = V::dot_nibbles(partial[r][t], low, x[t] + 8 * j);
                    partial[r][t] = V::dot_nibbles(partial[r][t], high, x[t] + 8 * j + 4);
                }
            }
        for (int r = 0; r < 2; ++r)
            for (int t = 0; t < N; ++t) sums[r][t] = V::total(partial[r][t], start[t]);
    } else {
        for (int r = 0; r < 2; ++r)
            for (int t = 0; t < N; ++t) sums[r][t] = start[t];
#pragma GCC unroll 8
        for (int j = 0; j < kLines; ++j)
#pragma GCC unroll 2
            for (int r = 0; r < 2; ++r) {
                const auto codes = V::line(line[r] + 64 * j);
                if constexpr (kKind == kBook) {
                    const auto low = V::lookup(book, V::low(codes)), high = V::lookup(book, V::high(codes));
#pragma GCC unroll 8
                    for (int t = 0; t < N; ++t) {
                        sums[r][t] = V::dot(sums[r][t], low, x[t] + 8 * j);
                        sums[r][t] = V::dot(sums[r][t], high, x[t] + 8 * j + 4);
                    }
                } else {
                    const auto w = V::bytes(codes);
#pragma GCC unroll 8
                    for (int t = 0; t < N; ++t) sums[r][t] = V::dot(sums[r][t], w, x[t] + 4 * j);
                }
            }
    }
}

// What integer sums start from, so that offsets of codes and multipliers need no step of their own.
template <class V, Multipliers kKind, bool kMin>
inline __attribute__((always_inline)) typename V::A start_of(int32_t minus_sum) {
    const auto minus = V::set_int(minus_sum);
    if constexpr (kKind == kNibbles) return kMin ? V::set_int(0) : V::template shifted<3>(minus);
    if constexpr (kKind == kSigned && kMin)
        return V::kBias ? V::set_int(0) : V::template shifted<7>(V::set_int(-minus_sum));
    return V::kBias ? V::template shifted<7>(minus) : V::set_int(0);
}

template <class V, Multipliers kKind, bool kMin, bool kHalves, int N>
void tile(const TileArgs& args) {
    using F = typename V::F;
    constexpr bool kShifts = kKind == kBook && kMin;  // which make a minimum of the scale
    constexpr int kLines = kKind == kSigned ? 8 : 4;
    constexpr int kParts = kHalves ? 2 : 1;
    const int64_t blocks = blocks_of(args.part->cols), per_scale = args.part->group / kBlock;
    const auto book = V::book(args.part->book);
    F acc[2][N];
    for (auto& row : acc)
        for (auto& sum : row) sum = V::zero();

    const uint8_t* line[2] = {args.panels[0].codes, args.panels[1].codes};
    const uint16_t* scales[2] = {args.panels[0].scales, args.panels[1].scales};
    const uint16_t* mins[2] = {args.panels[0].mins, args.panels[1].mins};
    const auto next_group = [&](int r) {
        scales[r] += kRows;
        if constexpr (kMin && !kShifts) mins[r] += kRows;
    };
    [[maybe_unused]] const F shift = V::set(static_cast<float>(args.part->shift));
    [[maybe_unused]] const F no_shift = V::set(static_cast<float>(-kNoShift * args.part->shift));
    int64_t left = per_scale;
    for (int64_t b = 0; b < blocks; ++b) {
        const Acts block{const_cast<uint8_t*>(args.acts) + b * kActBytes * N, N};
#pragma GCC unroll 2
        for (int part = 0; part < kParts; ++part) {
            const int8_t* x[N];
            typename V::A start[N], sums[2][N];
#pragma GCC unroll 8
            for (int t = 0; t < N; ++t) {
                x[t] = block.q(t) + part * 16;
                const int32_t minus = !kHalves ? block.minus_sum(t)
                                      : part == 0 ? block.minus_first(t)
                                                  : block.minus_sum(t) - block.minus_first(t);
                start[t] = start_of<V, kKind, kMin>(minus);
            }
            dot_lines<V, kKind, kLines / kParts, N>(line, x, start, book, sums);
#pragma GCC unroll 2
            for (int r = 0; r < 2; ++r) {
#pragma GCC unroll 8
                for (int j = 0; j < kLines / kParts; ++j) __builtin_prefetch(line[r] + kAhead + 64 * j);
                const F scale = V::load_f16(scales[r]);
#pragma GCC unroll 8
                for (int t = 0; t < N; ++t)
                    acc[r][t] = V::fma(V::to_float(sums[r][t]), V::mul(scale, V::set(block.d(t))), acc[r][t]);
                if constexpr (kMin) {
                    F min;
                    if constexpr (kShifts) min = V::mul(scale, V::fma(V::low_bits(scales[r]), shift, no_shift));
                    else min = V::load_f16(mins[r]);
#pragma GCC unroll 8
                    for (int t = 0; t < N; ++t) {
                        float d_sum = block.d_sum(t);
                        if (kHalves)
                            d_sum = block.d(t) * static_cast<float>(part == 0 ? -block.minus_first(t)
                                                                    : block.minus_first(t) - block.minus_sum(t));
                        acc[r][t] = V::fma(min, V::set(d_sum), acc[r][t]);
                    }
                }
                line[r] += 64 * kLines / kParts;
                if (kHalves) next_group(r);
            }
        }
        if (!kHalves && --left == 0) {
            left = per_scale;
            next_group(0), next_group(1);
        }
    }
    const F unit = V::set(args.part->unit);
    for (int r = 0; r < 2; ++r)
        for (int t = 0; t < N; ++t) V::store(args.out + (r * N + t) * 16, V::mul(acc[r][t], unit));
}

template <class V, Form kForm>
inline typename V::F load_value(const uint8_t* values, int64_t at) {
    if constexpr (kForm == kF32) return V::load(reinterpret_cast<const float*>(values) + at);
    if constexpr (kForm == kF16) return V::load_f16(reinterpret_cast<const uint16_t*>(values) + at);
    return V::load_bf16(reinterpret_cast<const uint16_t*>(values) + at);
}

template <class V, Form kForm, int N>
void float_tile(const TileArgs& args) {
    using F = typename V::F;
    F acc[2][N];
    for (auto& row : acc)
        for (auto& sum : row) sum = V::zero();
    for (int64_t k = 0; k < args.part->cols; ++k)
#pragma GCC unroll 2
        for (int r = 0; r < 2; ++r) {
            const F w = load_value<V, kForm>(args.panels[r].codes, k * 16);
#pragma GCC unroll 8
            for (int t = 0; t < N; ++t) acc[r][t] = V::fma(w, V::set(args.x[t * args.stride + k]), acc[r][t]);
        }
    for (int r = 0; r < 2; ++r)
        for (int t = 0; t < N; ++t) V::store(args.out + (r * N + t) * 16, acc[r][t]);
}

template <class V, int N>
TileFunction tile_function_of(const Panels& part) {
    const bool halves = part.group == 16;
    switch (part.form) {
        case kF32: return float_tile<V, kF32, N>;
        case kF16: return float_tile<V, kF16, N>;
        case kBF16: return float_tile<V, kBF16, N>;
        case kQ8:
            if (part.mins) return halves ? tile<V, kSigned, true, true, N> : tile<V, kSigned, true, false, N>;
            return halves ? tile<V, kSigned, false, true, N> : tile<V, kSigned, false, false, N>;
        default: break;
    }
    if (part.shift) return halves ? tile<V, kBook, true, true, N> : tile<V, kBook, true, false, N>;
    if (part.has_book) return halves ? tile<V, kBook, false, true, N> : tile<V, kBook, false, false, N>;
    if (part.mins) return halves ? tile<V, kNibbles, true, true, N> : tile<V, kNibbles, true, false, N>;
    return halves ? tile<V, kNibbles, false, true, N> : tile<V, kNibbles, false, false, N>;
}

// For tiles of n tokens, 1 to N.
template <class V, int N = V::kTile>
TileFunction tile_function(const Panels& part, int64_t n) {
    if constexpr (N > 1) {
        if (n < N) return tile_function<V, N - 1>(part, n);
    }
    return tile_function_of<V, N>(part);
}
