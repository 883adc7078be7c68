// Numbers that kernels of several GPUs give each other.
//
// A word has a float32 and the number of the sum that it belongs to: whoever waits for the number
// has the value, without fences and further signals. Words are written and read whole.
#pragma once
#include "common.cuh"

constexpr int kMostPeers = 8;

__device__ __forceinline__ void send_word(uint64_t* to, float value, uint32_t epoch) {
    store_relaxed(to, static_cast<uint64_t>(epoch) << 32 | __float_as_uint(value));
}

__device__ __forceinline__ float await_word(const uint64_t* from, uint32_t epoch) {
    uint64_t word;
    do word = relaxed(from);
    while (static_cast<uint32_t>(word >> 32) != epoch);
    return __uint_as_float(static_cast<uint32_t>(word));
}

// Of this sum. The first cache may have an older one.
__device__ __forceinline__ uint32_t epoch_of(const uint32_t* from) {
    return __ldcg(from);
}
