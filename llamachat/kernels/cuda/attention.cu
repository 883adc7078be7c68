// Attention of a few tokens over the slot table, split along the context so that all of the GPU
// reads keys: `attend` gives partial results, `combine` adds them up and brings them to 8 bits.
// Compiled for HEAD_DIM, HEADS (query heads of a block, which share a kv head) and CACHE.
#include "common.cuh"

enum CacheForm { kF32, kBf16, kInt8 };
// Lanes that share an entry, eight elements each.
constexpr int kLanes = HEAD_DIM <= 8 ? 1 : HEAD_DIM <= 16 ? 2 : HEAD_DIM <= 32 ? 4 : HEAD_DIM <= 64 ? 8
    : HEAD_DIM <= 128 ? 16 : 32;
constexpr int kEntries = kWarp / kLanes;    // of a warp at once
constexpr int kWarps = 4, kAhead = 4;
constexpr int kHalf = HEAD_DIM / 2;
constexpr float kLog2E = 1.44269504f;
constexpr float kLeast = -1e30f;
constexpr int kElement = CACHE == kF32 ? 4 : CACHE == kBf16 ? 2 : 1;

struct Attention {
    const float* qkv;      // (T, H + 2 K, E)
    const float* cosines;  // (T, E / 2)
    const float* sines;
    const int* row;        // (T,) and so on: the batch
    const int* slot;
    const int* seen;
    const int* table;      // (B, table_stride)
    uint8_t* keys;         // (K, slots, E) of this layer
    uint8_t* values;
    float* key_scales;     // (K, slots), of 8-bit codes; or null
    float* value_scales;
    float* partial;        // (T, H, splits, E)
    float* weights;        // (T, H, splits, 2): the largest score, times log2(e), and the sum
    Acts out;              // (T, H E)
    int64_t slots;
    int64_t table_stride;
    int heads;             // H
    int kv_heads;
    int splits;
    int is_stored;         // whether keys and values of this pass are in the cache already
};

// Eight elements from `e` of head `head` of token t, turned.
__device__ __forceinline__ void turned8(const Attention& a, int64_t t, int head, int e, float (&out)[8]) {
    const float* x = a.qkv + (t * (a.heads + 2 * a.kv_heads) + head) * HEAD_DIM;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int pair = e + i < kHalf ? e + i : e + i - kHalf;
        const float c = a.cosines[t * kHalf + pair], s = a.sines[t * kHalf + pair];
        const float first = x[pair], second = x[pair + kHalf];
        out[i] = e + i < kHalf ? first * c - second * s : first * s + second * c;
    }
}

// Eight elements to row `at` of keys or values; for 8 bits the kLanes lanes of a row act together.
__device__ __forceinline__ void store8(uint8_t* to, float* scales, int64_t at, int e, bool is_in, const float (&x)[8]) {
    if constexpr (CACHE == kInt8) {
        float top = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) top = is_in ? larger(top, fabsf(x[i])) : top;
#pragma unroll
        for (int step = kLanes / 2; step > 0; step /= 2) top = larger(top, __shfl_xor_sync(kAll, top, step));
        float scale = __fdiv_rn(top, 127.0f);
        if (scale < kTiny) scale = 0;
        if (!is_in) return;
        if (e == 0) scales[at] = scale;
#pragma unroll
        for (int i = 0; i < 8; ++i)
            to[at * HEAD_DIM + e + i] = static_cast<uint8_t>(scale == 0 ? 0 : __float2int_rn(__fdiv_rn(x[i], scale)));
    } else if (is_in) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if constexpr (CACHE == kF32) reinterpret_cast<float*>(to)[at * HEAD_DIM + e + i] = x[i];
            else reinterpret_cast<uint16_t*>(to)[at * HEAD_DIM + e + i] = to_bfloat16(x[i]);
        }
    }
}

// The key and value of token t for one kv head, by a whole warp of which the first kLanes store.
__device__ __forceinline__ void append(const Attention& a, int64_t t, int kv_head) {
    const int e = threadIdx.x % kWarp * 8;
    const bool is_in = e < HEAD_DIM;
    float key[8] = {}, value[8] = {};
    if (is_in) {
        turned8(a, t, a.heads + kv_head, e, key);
        const float* v = a.qkv + (t * (a.heads + 2 * a.kv_heads) + a.heads + a.kv_heads + kv_head) * HEAD_DIM;
#pragma unroll
        for (int i = 0; i < 8; ++i) value[i] = v[e + i];
    }
    const int64_t at = kv_head * a.slots + a.slot[t];
    store8(a.keys, a.key_scales, at, e, is_in, key);
    store8(a.values, a.value_scales, at, e, is_in, value);
}

extern "C" __global__ void store(const __grid_constant__ Attention a) {
    release_next();
    await_inputs();
    append(a, blockIdx.y, blockIdx.x);
}

// Turned queries as bfloat16 (T, H, E) to `partial`; a warp each.
extern "C" __global__ void turn(const __grid_constant__ Attention a) {
    release_next();
    await_inputs();
    const int e = threadIdx.x * 8;
    if (e >= HEAD_DIM) return;
    float q[8];
    turned8(a, blockIdx.y, blockIdx.x, e, q);
    const int64_t row = static_cast<int64_t>(blockIdx.y) * a.heads + blockIdx.x;
    uint16_t* to = reinterpret_cast<uint16_t*>(a.partial) + row * HEAD_DIM + e;
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = to_bfloat16(q[i]);
}

struct Eight {
    uint4 low, high;  // as stored: 32, 16 or 8 bytes
};

__device__ __forceinline__ Eight load8(const uint8_t* from, int64_t at) {
    Eight raw{};
    const uint8_t* p = from + at * kElement;
    if constexpr (CACHE == kInt8) {
        const uint2 two = *reinterpret_cast<const uint2*>(p);
        raw.low.x = two.x, raw.low.y = two.y;
    } else {
        raw.low = *reinterpret_cast<const uint4*>(p);
        if constexpr (CACHE == kF32) raw.high = *reinterpret_cast<const uint4*>(p + 16);
    }
    return raw;
}

__device__ __forceinline__ void as_floats(const Eight& raw, float (&out)[8]) {
    const uint32_t words[8] = {raw.low.x, raw.low.y, raw.low.z, raw.low.w,
                               raw.high.x, raw.high.y, raw.high.z, raw.high.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if constexpr (CACHE == kF32) out[i] = __uint_as_float(words[i]);
        else if constexpr (CACHE == kBf16) out[i] = of_bfloat16((words[i / 2] >> (16 * (i % 2))) & 0xFFFF);
        else out[i] = static_cast<float>(static_cast<signed char>(words[i / 4] >> (8 * (i % 4))));
    }
}

struct State {  // of one query head: softmax over what was seen so far (Milakov, arXiv 1805.02867)
    float most, sum, out[8];
};

__device__ __forceinline__ void rescale(State& s, float most) {
    const float factor = exp2f(s.most - most);
    s.most = most;
    s.sum *= factor;
#pragma unroll
    for (int i = 0; i < 8; ++i) s.out[i] *= factor;
}

__device__ __forceinline__ void attend_to(
    const Attention& a, const int* table, int kv_head, int begin, int end, int e,
    const float (&q)[HEADS][8], State (&states)[HEADS]) {
    const int warp = threadIdx.x / kWarp, sub = threadIdx.x % kWarp / kLanes;
    const bool is_in = e < HEAD_DIM;
    for (int base = begin; base < end; base += kWarps * kEntries * kAhead) {
        Eight keys[kAhead], values[kAhead];
        float key_scale[kAhead], value_scale[kAhead];
        bool is_seen[kAhead];
#pragma unroll
        for (int n = 0; n < kAhead; ++n) {
            const int entry = base + (n * kWarps + warp) * kEntries + sub;
            is_seen[n] = entry < end;
            const int64_t at = kv_head * a.slots + (is_seen[n] ? table[entry] : 0);
            keys[n] = values[n] = Eight{};
            key_scale[n] = value_scale[n] = 1.0f;
            if (!is_seen[n]) continue;
            if (is_in) keys[n] = load8(a.keys, at * HEAD_DIM + e), values[n] = load8(a.values, at * HEAD_DIM + e);
            if (CACHE == kInt8) key_scale[n] = a.key_scales[at], value_scale[n] = a.value_scales[at];
        }
#pragma unroll
        for (int h = 0; h < HEADS; ++h) {
            float scores[kAhead], most = states[h].most;
#pragma unroll
            for (int n = 0; n < kAhead; ++n) {
                float k[8], dot = 0;
                as_floats(keys[n], k);
#pragma unroll
                for (int i = 0; i < 8; ++i) dot = fmaf(q[h][i], k[i], dot);
                scores[n] = sum_over<kLanes>(dot) * key_scale[n];
                most = is_seen[n] ? fmaxf(most, scores[n]) : most;
            }
            rescale(states[h], most);
#pragma unroll
            for (int n = 0; n < kAhead; ++n) {
                const float share = is_seen[n] ? exp2f(scores[n] - most) : 0.0f;
                float v[8];
                as_floats(values[n], v);
                states[h].sum += share;
#pragma unroll
                for (int i = 0; i < 8; ++i) states[h].out[i] = fmaf(share * value_scale[n], v[i], states[h].out[i]);
            }
        }
    }
}

// The states of a warp's lanes, then of the warps, become one; it goes to memory.
__device__ __forceinline__ void store_partial(const Attention& a, int64_t t, int head, int split, int e, State s, bool is_head) {
    __shared__ float outs[kWarps][HEAD_DIM];
    __shared__ float2 heads[kWarps];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
    for (int step = kLanes; step < kWarp; step *= 2) {
        const float most = __shfl_xor_sync(kAll, s.most, step);
        rescale(s, fmaxf(s.most, most));  // as the other lane does
        s.sum += __shfl_xor_sync(kAll, s.sum, step);
#pragma unroll
        for (int i = 0; i < 8; ++i) s.out[i] += __shfl_xor_sync(kAll, s.out[i], step);
    }
    if (lane == 0) heads[warp] = make_float2(s.most, s.sum);
    if (lane < kLanes && e < HEAD_DIM) {
#pragma unroll
        for (int i = 0; i < 8; ++i) outs[warp][e + i] = s.out[i];
    }
    __syncthreads();
    float most = kLeast, sum = 0, factors[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) most = fmaxf(most, heads[w].x);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        factors[w] = exp2f(heads[w].x - most);
        sum += factors[w] * heads[w].y;
    }
    const int64_t at = (t * a.heads + head) * a.splits + split;
    if (is_head && threadIdx.x == 0) a.weights[2 * at] = most, a.weights[2 * at + 1] = sum;
    for (int i = threadIdx.x; is_head && i < HEAD_DIM; i += kWarps * kWarp) {
        float out = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) out += factors[w] * outs[w][i];
        a.partial[at * HEAD_DIM + i] = out;
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(kWarps * kWarp) attend(const __grid_constant__ Attention a) {
    release_next();
    await_inputs();
    const int shared_by = a.heads / a.kv_heads;  // query heads of a kv head
    const int tiles = (shared_by + HEADS - 1) / HEADS;
    const int kv_head = blockIdx.x / tiles, first = blockIdx.x % tiles * HEADS;
    const int split = blockIdx.y;
    const int64_t t = blockIdx.z;
    const int seen = a.seen[t];
    const int share = (seen + a.splits - 1) / a.splits;
    const int begin = min(split * share, seen), end = min(begin + share, seen);
    const int e = threadIdx.x % kLanes * 8;
    if (!a.is_stored && begin < seen && end == seen) {  // this block reads what it stores itself
        if (threadIdx.x < kWarp) append(a, t, kv_head);
        __syncthreads();
    }
    float q[HEADS][8] = {};
    State states[HEADS];
    const float scale = kLog2E / sqrtf(static_cast<float>(HEAD_DIM));
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        states[h] = State{kLeast, 0.0f, {}};
        const int head = kv_head * shared_by + min(first + h, shared_by - 1);
        if (e < HEAD_DIM) turned8(a, t, head, e, q[h]);
#pragma unroll
        for (int i = 0; i < 8; ++i) q[h][i] *= scale;
    }
    attend_to(a, a.table + a.row[t] * a.table_stride, kv_head, begin, end, e, q, states);
#pragma unroll
    for (int h = 0; h < HEADS; ++h)
        store_partial(a, t, kv_head * shared_by + first + h, split, e, states[h], first + h < shared_by);
}

// A warp gives 32 elements of a token.
extern "C" __global__ void combine(const __grid_constant__ Attention a) {
    release_next();
    await_inputs();
    const int block = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
    if (block >= a.out.blocks) return;
    const int64_t t = blockIdx.y;
    const int element = min(block * kBlock + static_cast<int>(threadIdx.x % kWarp), a.out.dim - 1);
    const int64_t at = (t * a.heads + element / HEAD_DIM) * a.splits;
    float most = kLeast;
#pragma unroll 8
    for (int s = 0; s < a.splits; ++s) most = fmaxf(most, a.weights[2 * (at + s)]);
    float sum = 0, out = 0;
#pragma unroll 8
    for (int s = 0; s < a.splits; ++s) {
        const float factor = exp2f(a.weights[2 * (at + s)] - most);
        sum += factor * a.weights[2 * (at + s) + 1];
        out += factor * a.partial[(at + s) * HEAD_DIM + element % HEAD_DIM];
    }
    const bool is_in = block * kBlock + threadIdx.x % kWarp < a.out.dim;
    store_block(a.out, t, block, is_in ? out / sum : 0.0f);
}
