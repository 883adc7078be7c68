// Stands in for kernels/cuda/common.cuh where a kernel runs on the CPU: the lanes of a warp take
// turns, each until it asks the others for their values.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__

using std::max;
using std::min;

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xFFFFFFFFu;

struct Index {
    unsigned x;
};
inline Index threadIdx, blockIdx, blockDim;

struct Lane {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 16);
    float given[2];  // in even turns, and in odd ones
    unsigned turn = 0;
    bool is_done = false;
};

inline Lane lanes[kWarp];
inline ucontext_t scheduler;

inline Lane& this_lane() { return lanes[threadIdx.x % kWarp]; }

inline float __shfl_xor_sync(unsigned, float value, int step) {
    const unsigned turn = this_lane().turn++ % 2;
    this_lane().given[turn] = value;
    swapcontext(&this_lane().context, &scheduler);
    return lanes[threadIdx.x % kWarp ^ step].given[turn];
}

template <int WIDTH>
float sum_over(float value) {
    for (int step = WIDTH / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAll, value, step);
    return value;
}

template <class To, class From>
To as(From from) {
    To to;
    static_assert(sizeof to == sizeof from);
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline float __uint_as_float(uint32_t bits) { return as<float>(bits); }
inline float __int_as_float(int bits) { return as<float>(bits); }
inline float of_half(uint32_t bits) { return static_cast<float>(as<_Float16>(static_cast<uint16_t>(bits))); }
inline float of_bfloat16(uint32_t bits) { return as<float>(bits << 16); }
inline uint32_t to_half(float value) { return as<uint16_t>(static_cast<_Float16>(value)); }
inline void release_next() {}
inline void await_inputs() {}

inline void (*work)();

inline void begin() {
    work();
    this_lane().is_done = true;
    swapcontext(&this_lane().context, &scheduler);
}

inline void run_warp(unsigned first) {
    for (Lane& lane : lanes) {
        lane.turn = 0, lane.is_done = false;
        getcontext(&lane.context);
        lane.context.uc_stack.ss_sp = lane.stack.data();
        lane.context.uc_stack.ss_size = lane.stack.size();
        makecontext(&lane.context, begin, 0);
    }
    while (!std::all_of(lanes, lanes + kWarp, [](const Lane& lane) { return lane.is_done; })) {
        for (int i = 0; i < kWarp; ++i) {
            threadIdx.x = first + i;
            if (!lanes[i].is_done) swapcontext(&scheduler, &lanes[i].context);
        }
    }
}

template <class Args>
void run(void (*kernel)(Args), const void* args, unsigned blocks, unsigned threads) {
    static void (*called)(Args);
    static const Args* with;
    called = kernel, with = static_cast<const Args*>(args);
    work = [] { called(*with); };
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        for (unsigned first = 0; first < threads; first += kWarp) run_warp(first);
    }
}
