// CUDA kernels on the CPU, to test what they compute and that they wait where they must: what a
// kernel needs beside C++17, ptx.cuh's instructions among it. emulated.cpp runs the threads.
//
// A block is a thread of the system; its threads are fibers, of which a random one runs until it
// waits for others. Copies to shared memory are carried out late, in any order.
#pragma once

#include <math.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <type_traits>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static thread_local
#define __align__(n) alignas(n)

struct Index { unsigned x, y, z; };
struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct int4 { int x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace emulated {

constexpr int kLanes = 32;

extern thread_local Index thread, block, block_size, grid_size;
extern thread_local uint8_t* shared;

void wait(int n_threads);          // until so many threads of this block are here
void wait_warp();                  // until the other lanes are
void pause();                      // others go on
void* exchange();                  // of this warp, 8 bytes by 8 words for each lane
void later(std::function<void()> copy);

// What all lanes of the warp give, to each of them. Two rooms take turns: a lane that writes to one
// again has waited for those that read it.
template <class T>
const T* gathered(const T& mine) {
    static_assert(sizeof(T) <= 64 && std::is_trivially_copyable_v<T>);
    T* all = static_cast<T*>(exchange());
    all[thread.x % kLanes] = mine;
    wait_warp();
    return all;
}

template <class To, class From>
To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

}  // namespace emulated

#define threadIdx emulated::thread
#define blockIdx emulated::block
#define blockDim emulated::block_size
#define gridDim emulated::grid_size

template <class T, class U> std::common_type_t<T, U> min(T a, U b) { return b < a ? b : a; }
template <class T, class U> std::common_type_t<T, U> max(T a, U b) { return a < b ? b : a; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __float2int_rn(float x) {  // 0 for what is not a number
    return x != x ? 0 : static_cast<int>(std::lrint(std::fmin(std::fmax(x, -2147483648.0), 2147483647.0)));
}
inline float __uint_as_float(uint32_t x) { return emulated::bits_as<float>(x); }
inline float __int_as_float(int x) { return emulated::bits_as<float>(x); }
inline uint32_t __float_as_uint(float x) { return emulated::bits_as<uint32_t>(x); }
template <class T> T __ldcg(const T* from) { return *from; }
template <class T> T __ldca(const T* from) { return *from; }

inline void __syncthreads() {
    emulated::wait(static_cast<int>(blockDim.x));
}
inline void __syncwarp() { emulated::wait_warp(); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline uint64_t atomicMax(uint64_t* to, uint64_t value) {
    uint64_t most = __atomic_load_n(to, __ATOMIC_SEQ_CST);
    while (most < value && !__atomic_compare_exchange_n(to, &most, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {}
    return most;
}
inline int atomicAdd(int* to, int value) { return __atomic_fetch_add(to, value, __ATOMIC_SEQ_CST); }
template <class T> T __shfl_sync(unsigned, T value, int lane) {
    return emulated::gathered(value)[lane % emulated::kLanes];
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int step) {
    return __shfl_sync(mask, value, static_cast<int>(threadIdx.x) % emulated::kLanes ^ step);
}

inline float of_half(uint32_t bits) {
    const int sign = bits & 0x8000 ? -1 : 1, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    return sign * std::ldexp(float(exponent ? 1024 + fraction : fraction), exponent ? exponent - 25 : -24);
}
inline float2 of_halves(uint32_t bits) { return {of_half(bits & 0xFFFF), of_half(bits >> 16)}; }
inline uint32_t flip_and_keep(uint32_t x, uint32_t flipped, uint32_t kept) { return (x ^ flipped) & kept; }
inline int sum_halves(int word) { return static_cast<int16_t>(word) + (word >> 16); }
inline uint32_t to_half(float x) { return emulated::bits_as<uint16_t>(static_cast<_Float16>(x)); }
inline int dot4(int a, int b, int sum) {
    for (int i = 0; i < 32; i += 8) sum += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
    return sum;
}
inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t both = a | static_cast<uint64_t>(b) << 32;
    uint32_t bytes = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t number = selector >> (4 * i);
        const uint32_t byte = both >> (8 * (number & 7)) & 0xFF;
        bytes |= (number & 8 ? (byte & 0x80 ? 0xFFu : 0u) : byte) << (8 * i);
    }
    return bytes;
}
template <class T> T read_if(const void* from, bool is_in) {
    T value{};
    if (is_in) std::memcpy(&value, from, sizeof value);
    return value;
}
inline uint4 stream16(const void* from, bool is_in) { return read_if<uint4>(from, is_in); }
inline uint32_t stream4(const void* from, bool is_in) { return read_if<uint32_t>(from, is_in); }
inline uint32_t stream2(const void* from, bool is_in) { return read_if<uint16_t>(from, is_in); }
inline void fetch_ahead(const void*, int64_t) {}
inline void release_next() {}
inline void await_inputs() {}

// Of compute capability 9.0.

struct alignas(64) Map {  // tests/emulated.py encodes it
    const uint8_t* base;
    int64_t stride, row_bytes, rows, box_bytes, box_rows, is_swizzled, unused[9];
};

// A barrier's word: the parity of its phase, the arrivals of a phase, those and the bytes to come.
struct Barrier {
    uint16_t parity, arrivals, missing;
    int16_t kib16;  // bytes, by 16: all copies are such multiples
};
inline Barrier& barrier_of(uint64_t* word) { return *reinterpret_cast<Barrier*>(word); }
inline void barrier_settle(Barrier& barrier) {
    if (barrier.missing || barrier.kib16) return;
    barrier.parity ^= 1, barrier.missing = barrier.arrivals;
}
template <int THREADS> void sync_first() { emulated::wait(THREADS); }
inline void barrier_init(uint64_t* word, int arrivals) {
    barrier_of(word) = Barrier{0, uint16_t(arrivals), uint16_t(arrivals), 0};
}
inline void barrier_arrive(uint64_t* word) {
    --barrier_of(word).missing;
    barrier_settle(barrier_of(word));
}
inline void barrier_expect(uint64_t* word, int bytes) {
    barrier_of(word).kib16 += bytes / 16;
    barrier_arrive(word);
}
inline void barrier_wait(uint64_t* word, int parity) {
    while (barrier_of(word).parity == parity) emulated::pause();
}
inline void acquire_map(const Map*) {}
inline void prefetch_map(const Map*) {}
inline void copy_box(void* to, const Map* map, int x, int y, uint64_t* word) {
    emulated::later([=] {
        for (int64_t row = 0; row < map->box_rows; ++row) {
            for (int64_t i = 0; i < map->box_bytes; ++i) {
                const bool is_in = x + i < map->row_bytes && y + row < map->rows;
                int64_t at = row * map->box_bytes + i;
                if (map->is_swizzled) at ^= (at >> 7 & 7) << 4;
                static_cast<uint8_t*>(to)[at] = is_in ? map->base[(y + row) * map->stride + x + i] : 0;
            }
        }
        barrier_of(word).kib16 -= map->box_bytes * map->box_rows / 16;
        barrier_settle(barrier_of(word));
    });
}

struct Fragment { uint32_t a[4], b[2]; };

inline void load_matrices(const void* row, uint32_t (&to)[4]) {
    const void* const* rows = emulated::gathered(row);
    const int lane = threadIdx.x % emulated::kLanes;
    for (int i = 0; i < 4; ++i)
        std::memcpy(&to[i], static_cast<const uint8_t*>(rows[8 * i + lane / 4]) + lane % 4 * 4, 4);
}

// Entry k of the matrices' rows and columns as numbers, `T` of them in each word.
template <class T, class Sum, class Value>
void multiply_fragments(Sum (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Value value) {
    Fragment mine;
    std::memcpy(mine.a, a, sizeof mine.a), std::memcpy(mine.b, b, sizeof mine.b);
    const Fragment* all = emulated::gathered(mine);
    const int lane = threadIdx.x % emulated::kLanes;
    constexpr int kPer = 4 / sizeof(T);
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4, column = lane % 4 * 2 + i % 2;
        for (int word = 0; word < 8; ++word) {
            const uint32_t x = all[row * 4 + word % 4].a[word / 4 * 2 + i / 2];
            const uint32_t y = all[column * 4 + word % 4].b[word / 4];
            for (int k = 0; k < kPer; ++k)
                sums[i] += value(T(x >> (32 / kPer * k))) * value(T(y >> (32 / kPer * k)));
        }
    }
}
inline void multiply_bytes(
    const uint32_t (&a)[4], const uint32_t (&b)[2], const int (&start)[4], int (&sums)[4]) {
    std::memcpy(sums, start, sizeof sums);
    multiply_fragments<int8_t>(sums, a, b, [](int8_t x) { return static_cast<int>(x); });
}
inline void multiply_bfloat16(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    multiply_fragments<uint16_t>(sums, a, b, [](uint16_t x) { return __uint_as_float(uint32_t(x) << 16); });
}
inline uint32_t pack_bfloat16(float first, float second) {
    const auto rounded = [](float x) {
        const uint32_t bits = __float_as_uint(x);
        return x != x ? 0x7FFFu : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    };
    return rounded(first) | rounded(second) << 16;
}
inline void add_released(uint64_t* count) { __atomic_fetch_add(count, 1, __ATOMIC_RELEASE); }
inline uint64_t acquired(const uint64_t* count) {
    emulated::pause();
    return __atomic_load_n(count, __ATOMIC_ACQUIRE);
}
inline void store_relaxed(uint64_t* to, uint64_t word) { __atomic_store_n(to, word, __ATOMIC_RELAXED); }
inline uint64_t relaxed(const uint64_t* from) {
    emulated::pause();
    return __atomic_load_n(from, __ATOMIC_RELAXED);
}
inline uint8_t* dynamic_memory() { return emulated::shared; }
