// Queries and keys turned by their positions; keys and values written to the cache.

#pragma once
#include <cfloat>
#include <cstring>

#include "abi.h"
#include "simd.h"

// An element of the cache, and how sixteen of them become floats and back.
template <class V, CacheForm kForm>
struct Element;

template <class V>
struct Element<V, kCacheF32> {
    using T = float;
    static typename V::F load(const T* p) { return V::load(p); }
    static void store(T* p, typename V::F x) { V::store(p, x); }
};

template <class V>
struct Element<V, kCacheBF16> {
    using T = uint16_t;
    static typename V::F load(const T* p) { return V::load_bf16(p); }
    static void store(T* p, typename V::F x) { V::store_bf16(p, x); }
};

template <class V>
struct Element<V, kCacheInt8> {
    using T = int8_t;
    static typename V::F load(const T* p) { return V::load_i8(p); }
    static void store(T* p, typename V::F x) { V::store_i8(p, x); }
};

// What the cache holds of one head in one layer.
template <class V, CacheForm kForm>
struct CachedHead {
    using T = typename Element<V, kForm>::T;
    const Cache& cache;
    int64_t first, per_chunk;  // of this head's slots in the first chunk; from one chunk to the next

    CachedHead(const Cache& cache_, int64_t layer, int64_t head)
        : cache(cache_), first((layer * cache.n_kv_heads + head) * cache.chunk),
          per_chunk(cache.n_layers * cache.n_kv_heads * cache.chunk) {}

    // Where a slot lies among all of all heads and layers.
    int64_t at(int64_t slot) const { return slot / cache.chunk * per_chunk + first + slot % cache.chunk; }

    // Of a slot: E elements, those of a key 16 apart.
    T* key(int64_t slot) const {
        return static_cast<T*>(cache.keys) + at(slot - slot % 16) * cache.head_dim + slot % 16;
    }
    T* value(int64_t slot) const { return static_cast<T*>(cache.values) + at(slot) * cache.head_dim; }
    float* key_scale(int64_t slot) const { return kForm == kCacheInt8 ? cache.key_scales + at(slot) : nullptr; }
    float* value_scale(int64_t slot) const { return kForm == kCacheInt8 ? cache.value_scales + at(slot) : nullptr; }
};

// Turns the pairs (x[i], x[i + half]) by the angles of their token.
template <class V>
void rotate(const float* x, const float* cosines, const float* sines, int64_t half, float scale, float* out) {
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[i + half];
        out[i] = (a * cosines[i] - b * sines[i]) * scale;
        out[i + half] = (a * sines[i] + b * cosines[i]) * scale;
    }
}

// x (n, a multiple of 16) as the cache holds it. Returns the scale of bytes, absmax / 127: nothing is
// kept of a row whose scale would be subnormal.
template <class V, CacheForm kForm>
float encode(const float* x, int64_t n, typename Element<V, kForm>::T* out) {
    using F = typename V::F;
    float scale = 1.0f;
    if constexpr (kForm == kCacheInt8) {
        F most = V::zero();
        for (int64_t i = 0; i < n; i += 16) most = V::max(most, V::abs(V::load(x + i)));
        scale = V::largest(most) / 127.0f;
        if (scale < FLT_MIN) scale = 0.0f;
    }
    const F divisor = V::set(scale > 0.0f ? scale : 1.0f);
    for (int64_t i = 0; i < n; i += 16) {
        const F value = V::load(x + i);
        Element<V, kForm>::store(out + i, kForm == kCacheInt8 ? V::div(value, divisor) : value);
    }
    return scale;
}

// Fetches what `remember` will write of a head's keys: the lines of a slot are far apart.
template <class V, CacheForm kForm>
void expect(const Attention& args, int64_t t, int64_t h) {
    const CachedHead<V, kForm> head(*args.cache, args.layer, h);
    auto* key = head.key(args.pass->slot[t]);
    for (int64_t e = 0; e < args.cache->head_dim; ++e) __builtin_prefetch(key + 16 * e, 1);
}

// Writes the key and value of token t and head h to its slot. `room` and `coded` hold `padded`
// elements each, E rounded up to 16.
template <class V, CacheForm kForm>
void remember(const Attention& args, int64_t t, int64_t h, int64_t padded, float* room,
              typename Element<V, kForm>::T* coded) {
    const Cache& cache = *args.cache;
    const int64_t head_dim = cache.head_dim, half = head_dim / 2, slot = args.pass->slot[t];
    const int64_t width = (args.n_heads + 2 * cache.n_kv_heads) * head_dim;
    const float* k = args.qkv + t * width + (args.n_heads + h) * head_dim;
    const float* v = k + cache.n_kv_heads * head_dim;
    std::memset(room + head_dim, 0, (padded - head_dim) * sizeof(float));
    const CachedHead<V, kForm> head(cache, args.layer, h);
    rotate<V>(k, args.cosines + t * half, args.sines + t * half, half, 1.0f, room);
    const float key_scale = encode<V, kForm>(room, padded, coded);
    for (int64_t e = 0; e < head_dim; ++e) head.key(slot)[16 * e] = coded[e];

    std::memcpy(room, v, head_dim * sizeof(float));
    const float value_scale = encode<V, kForm>(room, padded, coded);
    std::memcpy(head.value(slot), coded, head_dim * sizeof(*coded));
    if constexpr (kForm == kCacheInt8) {
        *head.key_scale(slot) = key_scale;
        *head.value_scale(slot) = value_scale;
    }
}
