// Products of a few tokens: what they are called with, and what becomes of 32 rows of one.
#pragma once
#include "weights.cuh"

enum Mode { kStore, kAdd, kSwiglu, kSend };

struct Linear {
    Part parts[3];
    Acts x;
    Acts out;            // kAdd, kSwiglu: what becomes of it
    const float* bias;   // or null
    const float* gain;   // kAdd: of the norm that follows, or null
    const int* wanted;   // kStore: which tokens of x, or null for all
    float* y;            // (T, width): kStore writes, kAdd adds
    int64_t width;
    int n_parts;
    int tokens;
};

struct Beside {  // what a lane adds its row to: asked for before the product is there
    float bias, up_bias, h, gain;
};

// Of row `row` of token `token`; `end` is the first row beyond the last.
template <int AS>
__device__ __forceinline__ Beside read_beside(const Linear& a, int64_t token, int row, int end) {
    Beside beside{};
    if (row >= end) return beside;
    if (a.bias != nullptr) {
        beside.bias = a.bias[row];
        if (AS == kSwiglu) beside.up_bias = a.bias[end + row];
    }
    if (AS == kAdd) {
        beside.h = __ldcg(a.y + token * a.width + row);
        if (a.gain != nullptr) beside.gain = a.gain[row];
    }
    return beside;
}

// `value` is the product of this lane's row of block `block`, and `up` that of the other part.
template <int AS>
__device__ __forceinline__ void finish(
    const Linear& a, int64_t token, int block, int row, int end, float value, float up,
    const Beside& beside) {
    const bool is_row = row < end;
    value += beside.bias;
    if constexpr (AS == kSwiglu) {
        up += beside.up_bias;
        store_block(a.out, token, block, is_row ? value / (1.0f + expf(-value)) * up : 0.0f);
        return;
    }
    if (AS == kAdd) value = is_row ? value + beside.h : 0.0f;
    if (is_row) a.y[token * a.width + row] = value;
    if (AS == kAdd && a.gain != nullptr) store_normed(a.out, token, block, value, beside.gain);
}
