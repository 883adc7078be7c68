// Rotation, cache, and attention over the slot table, split along the context so that all of the GPU
// reads keys. Splits are added up and brought to 8 bits by the last of the blocks that share a tile
// of heads, or by `combine` where 32 elements are not of one head.
// Compiled for HEAD_DIM, HEADS (query heads of a block, which share a kv head), CACHE and WARPS.
#pragma once
#include "common.cuh"

enum CacheForm { kF32, kBf16, kInt8 };
// Lanes that share an entry, eight elements each.
constexpr int kLanes = HEAD_DIM <= 8 ? 1 : HEAD_DIM <= 16 ? 2 : HEAD_DIM <= 32 ? 4 : HEAD_DIM <= 64 ? 8
    : HEAD_DIM <= 128 ? 16 : 32;
constexpr int kEntries = kWarp / kLanes;    // of a warp at once
constexpr int kWarps = WARPS;
constexpr int kAhead = (HEADS > 1 ? 2 : 8) / (CACHE == kF32 ? 2 : 1);  // entries of a lane on their way
constexpr int kFew = HEADS > 1 ? 1 : 3;  // of those, that are attended to at once
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
    int* tickets;          // a zero for each token and tile of heads; or null: `combine` follows
    Acts out;              // (T, H E)
    int64_t slots;
    int64_t table_stride;
    int heads;             // H
    int kv_heads;
    int splits;
    int is_stored;         // whether keys and values of this pass are in the cache already
};

__device__ __forceinline__ void read8(const float* from, float (&to)[8]) {
    const float4 a = __ldcg(reinterpret_cast<const float4*>(from));
    const float4 b = __ldcg(reinterpret_cast<const float4*>(from) + 1);
    to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}

// Eight elements from `e` of head `head` of token t, turned.
__device__ __forceinline__ void turned8(const Attention& a, int64_t t, int head, int e, float (&out)[8]) {
    const float* x = a.qkv + (t * (a.heads + 2 * a.kv_heads) + head) * HEAD_DIM;
    if constexpr (kHalf % 8 == 0) {
        const int pair = e % kHalf;
        float c[8], s[8], first[8], second[8];
        read8(a.cosines + t * kHalf + pair, c), read8(a.sines + t * kHalf + pair, s);
        read8(x + pair, first), read8(x + pair + kHalf, second);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            out[i] = e < kHalf ? first[i] * c[i] - second[i] * s[i] : first[i] * s[i] + second[i] * c[i];
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int pair = e + i < kHalf ? e + i : e + i - kHalf;
            const float c = a.cosines[t * kHalf + pair], s = a.sines[t * kHalf + pair];
            const float first = __ldcg(x + pair), second = __ldcg(x + pair + kHalf);
            out[i] = e + i < kHalf ? first * c - second * s : first * s + second * c;
        }
    }
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

__device__ __forceinline__ void store8(uint8_t* to, int64_t at, const Eight& raw) {
    uint8_t* p = to + at * kElement;
    if constexpr (CACHE == kInt8) {
        *reinterpret_cast<uint2*>(p) = uint2{raw.low.x, raw.low.y};
    } else {
        *reinterpret_cast<uint4*>(p) = raw.low;
        if constexpr (CACHE == kF32) *reinterpret_cast<uint4*>(p + 16) = raw.high;
    }
}

// Eight elements as they are stored; for 8 bits the kLanes lanes of a row act together.
__device__ __forceinline__ Eight coded8(const float (&x)[8], float& scale) {
    scale = 1.0f;
    if constexpr (CACHE == kBf16) return {bfloat16s(x), {}};
    uint32_t words[8] = {};
    if constexpr (CACHE == kInt8) {
        float top = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) top = larger(top, fabsf(x[i]));
#pragma unroll
        for (int step = kLanes / 2; step > 0; step /= 2) top = larger(top, __shfl_xor_sync(kAll, top, step));
        scale = __fdiv_rn(top, 127.0f);
        if (scale < kTiny) scale = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int code = scale == 0 ? 0 : __float2int_rn(__fdiv_rn(x[i], scale));
            words[i / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(code)) << (8 * (i % 4));
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) words[i] = __float_as_uint(x[i]);
    }
    return {make_uint4(words[0], words[1], words[2], words[3]), make_uint4(words[4], words[5], words[6], words[7])};
}

template <int N>
struct Entries {  // of the context: eight elements of N keys and values
    Eight keys[N], values[N];
    float key_scale[N], value_scale[N];
};

// That of token t for one kv head, by a whole warp, whose lanes `is_storing` put it into the cache.
__device__ __forceinline__ Entries<1> append(const Attention& a, int64_t t, int kv_head, int e, bool is_storing) {
    const bool is_in = e < HEAD_DIM;
    float key[8] = {}, value[8] = {};
    if (is_in) {
        turned8(a, t, a.heads + kv_head, e, key);
        const float* v = a.qkv + (t * (a.heads + 2 * a.kv_heads) + a.heads + a.kv_heads + kv_head) * HEAD_DIM;
        read8(v + e, value);
    }
    Entries<1> own;
    own.keys[0] = coded8(key, own.key_scale[0]);
    own.values[0] = coded8(value, own.value_scale[0]);
    const int64_t at = kv_head * a.slots + a.slot[t];
    if (!is_storing || !is_in) return own;
    store8(a.keys, at * HEAD_DIM + e, own.keys[0]);
    store8(a.values, at * HEAD_DIM + e, own.values[0]);
    if (CACHE == kInt8 && e == 0) a.key_scales[at] = own.key_scale[0], a.value_scales[at] = own.value_scale[0];
    return own;
}

// The same, by a whole warp of which the first kLanes store.
__device__ __forceinline__ void append(const Attention& a, int64_t t, int kv_head) {
    const int lane = threadIdx.x % kWarp;
    append(a, t, kv_head, lane % kLanes * 8, lane < kLanes);
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

constexpr int kRound = kWarps * kEntries * kAhead;  // entries of a block on their way

__device__ __forceinline__ int entry_of(int base, int n) {
    const int warp = threadIdx.x / kWarp, sub = threadIdx.x % kWarp / kLanes;
    return base + (n * kWarps + warp) * kEntries + sub;
}

struct Slots {  // of a lane's entries from some base on, and of that one
    int first, of[kAhead];
};

// Asked for before it is known how many of them are seen: entries of the table that are not may be anything.
__device__ __forceinline__ Slots read_slots(const Attention& a, const int* table, int base) {
    const int last = static_cast<int>(a.table_stride) - 1;
    Slots slots{min(max(table[min(base, last)], 0), static_cast<int>(a.slots) - 1), {}};
#pragma unroll
    for (int n = 0; n < kAhead; ++n) slots.of[n] = table[min(entry_of(base, n), last)];
    return slots;
}

// Instead of entries that are not before `end` the first one: nothing branches, and nothing is waited for
// longer than needed. If that is not, nobody attends to what is read.
__device__ __forceinline__ void read_entries(
    const Attention& a, const Slots& slots, int kv_head, int base, int end, int e, Entries<kAhead>& to) {
#pragma unroll
    for (int n = 0; n < kAhead; ++n) {
        const int64_t at = kv_head * a.slots + (entry_of(base, n) < end ? slots.of[n] : slots.first);
        if (e < HEAD_DIM) {
            to.keys[n] = load8(a.keys, at * HEAD_DIM + e);
            to.values[n] = load8(a.values, at * HEAD_DIM + e);
        }
        if (CACHE == kInt8) to.key_scale[n] = a.key_scales[at], to.value_scale[n] = a.value_scales[at];
    }
}

// To N of them, from FROM on, if `is_in`.
template <int FROM, int N, int SIZE>
__device__ __forceinline__ void attend_to(
    const Entries<SIZE>& entries, const bool (&is_in)[N], const float (&q)[HEADS][8], State (&states)[HEADS]) {
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        float scores[N], most = states[h].most;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            float k[8], dot = 0;
            as_floats(entries.keys[FROM + n], k);
#pragma unroll
            for (int i = 0; i < 8; ++i) dot = fmaf(q[h][i], k[i], dot);
            scores[n] = sum_over<kLanes>(dot);
            if (CACHE == kInt8) scores[n] *= entries.key_scale[FROM + n];
            most = is_in[n] ? fmaxf(most, scores[n]) : most;
        }
        rescale(states[h], most);
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const float share = is_in[n] ? exp2f(scores[n] - most) : 0.0f;
            float v[8];
            as_floats(entries.values[FROM + n], v);
            states[h].sum += share;
            const float weight = CACHE == kInt8 ? share * entries.value_scale[FROM + n] : share;
#pragma unroll
            for (int i = 0; i < 8; ++i) states[h].out[i] = fmaf(weight, v[i], states[h].out[i]);
        }
    }
}

// To those from `base` on that are before `end`, a few at a time.
template <int FROM = 0>
__device__ __forceinline__ void attend_round(
    const Entries<kAhead>& entries, int base, int end, const float (&q)[HEADS][8], State (&states)[HEADS]) {
    if constexpr (FROM < kAhead) {
        constexpr int n_few = kAhead - FROM < kFew ? kAhead - FROM : kFew;
        if (base + FROM * kWarps * kEntries >= end) return;
        bool is_in[n_few];
#pragma unroll
        for (int n = 0; n < n_few; ++n) is_in[n] = entry_of(base, FROM + n) < end;
        attend_to<FROM>(entries, is_in, q, states);
        attend_round<FROM + n_few>(entries, base, end, q, states);
    }
}

// The states of a warp's lanes, then of the warps, become one: what is asked for if there is one split.
__device__ __forceinline__ void store_head(
    const Attention& a, int64_t t, int head, int split, int e, State s, bool is_head) {
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
    sync_first<kWarps * kWarp>();
    const int64_t at = (t * a.heads + head) * a.splits + split;
    for (int i = threadIdx.x; is_head && i < HEAD_DIM; i += kWarps * kWarp) {
        float most = kLeast, sum = 0, out = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) most = fmaxf(most, heads[w].x);
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            const float factor = exp2f(heads[w].x - most);
            sum += factor * heads[w].y, out += factor * outs[w][i];
        }
        if (a.splits == 1 && a.tickets != nullptr) {  // a warp has a block: HEAD_DIM is a multiple of 32
            store_block(a.out, t, (head * HEAD_DIM + i) / kBlock, out / sum);
            continue;
        }
        if (i == 0) a.weights[2 * at] = most, a.weights[2 * at + 1] = sum;
        a.partial[at * HEAD_DIM + i] = out;
    }
}

// What a warp gives: 32 elements of a token, of all splits.
__device__ __forceinline__ void combine_block(const Attention& a, int64_t t, int block) {
    const int element = min(block * kBlock + static_cast<int>(threadIdx.x % kWarp), a.out.dim - 1);
    const int64_t at = (t * a.heads + element / HEAD_DIM) * a.splits;
    float most = kLeast;
#pragma unroll 8
    for (int s = 0; s < a.splits; ++s) most = fmaxf(most, __ldcg(a.weights + 2 * (at + s)));
    float sum = 0, out = 0;
#pragma unroll 8
    for (int s = 0; s < a.splits; ++s) {
        const float factor = exp2f(__ldcg(a.weights + 2 * (at + s)) - most);
        sum += factor * __ldcg(a.weights + 2 * (at + s) + 1);
        out += factor * __ldcg(a.partial + (at + s) * HEAD_DIM + element % HEAD_DIM);
    }
    const bool is_in = block * kBlock + threadIdx.x % kWarp < a.out.dim;
    store_block(a.out, t, block, is_in ? out / sum : 0.0f);
}

// Whether the other splits of these heads are done: what they wrote can then be read past the first cache.
__device__ __forceinline__ bool is_last(const Attention& a, int ticket) {
    __shared__ bool answer;
    __threadfence();
    sync_first<kWarps * kWarp>();
    if (threadIdx.x == 0) {
        answer = atomicAdd(a.tickets + ticket, 1) == a.splits - 1;
        if (answer) a.tickets[ticket] = 0;  // for the next layer
        __threadfence();
    }
    sync_first<kWarps * kWarp>();
    return answer;
}

// Blocks that share a token and a split: HEADS query heads each.
__device__ __forceinline__ int tiles_of(const Attention& a) {
    return a.kv_heads * ((a.heads / a.kv_heads + HEADS - 1) / HEADS);
}

// One split of one tile by the first kWarps of a block; `await` until queries are there.
template <class Await>
__device__ __forceinline__ void attend_tile(const Attention& a, int tile, int split, int64_t t, Await await) {
    const int shared_by = a.heads / a.kv_heads;  // query heads of a kv head
    const int tiles = (shared_by + HEADS - 1) / HEADS;
    const int kv_head = tile / tiles, first = tile % tiles * HEADS;
    const int n_heads = min(HEADS, shared_by - first);
    const int e = threadIdx.x % kLanes * 8;
    if (a.is_stored) await();
    // The batch and what earlier passes stored do not depend on what is waited for.
    const int seen = a.seen[t];
    const int* table = a.table + a.row[t] * a.table_stride;
    int begin = 0, end = seen;
    if (a.splits > 1) {
        const int share = (seen + a.splits - 1) / a.splits;
        begin = min(split * share, seen), end = min(begin + share, seen);
    }
    const Slots slots = read_slots(a, table, begin);
    const bool is_own = !a.is_stored && begin < seen && end == seen;  // it stores the last one itself
    const int stored = end - is_own;
    Entries<kAhead> entries{};
    read_entries(a, slots, kv_head, begin, stored, e, entries);
    await();
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
    if (is_own && threadIdx.x / kWarp == kWarps - 1) {
        const bool is_in[1] = {threadIdx.x % kWarp < kLanes};
        attend_to<0>(append(a, t, kv_head, e, is_in[0]), is_in, q, states);
    }
    for (int base = begin; base < stored; base += kRound) {
        if (base > begin) read_entries(a, read_slots(a, table, base), kv_head, base, stored, e, entries);
        attend_round(entries, base, stored, q, states);
    }
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        if (h > 0) sync_first<kWarps * kWarp>();
        store_head(a, t, kv_head * shared_by + first + h, split, e, states[h], h < n_heads);
    }
    const int ticket = static_cast<int>(t) * tiles_of(a) + tile;
    if (a.tickets == nullptr || a.splits == 1 || !is_last(a, ticket)) return;
    const int begin_block = (kv_head * shared_by + first) * HEAD_DIM / kBlock;
    for (int i = threadIdx.x / kWarp; i < n_heads * HEAD_DIM / kBlock; i += kWarps)
        combine_block(a, t, begin_block + i);
}
