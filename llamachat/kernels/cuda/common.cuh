// What every kernel shares: conversions, sums over a warp, activations at 8 bits.
//
// No headers are needed, so that NVRTC alone compiles all of it. Each kernel takes one structure
// by value; structures.py has the same for ctypes.
#pragma once

typedef long long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;

constexpr int kWarp = 32;
constexpr int kBlock = 32;  // activations that share a scale
constexpr float kTiny = 1.17549435e-38f;  // the least normal float32
constexpr unsigned kAll = 0xFFFFFFFFu;

// Activations (T, K): codes, and the values themselves for weights that were not quantized.
struct Acts {
    uint8_t* codes;   // int8 (T, 2, blocks, 16): first halves of all blocks, then second halves
    float* scales;    // (T, blocks)
    int* sums;        // (T, blocks): of the codes of the first half, and in the upper 16 bits the second
    float* values;    // (T, blocks, 32)
    float* squares;   // (T, blocks): of the stream, whose norm is still to be divided by; or null
    int blocks;
    int dim;          // K
    float eps;        // of that norm
    int unused;
};

__device__ __forceinline__ float of_half(uint32_t bits) {
    float value;
    asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(value) : "r"(bits));
    return value;
}

__device__ __forceinline__ float of_bfloat16(uint32_t bits) { return __uint_as_float(bits << 16); }

// To the nearest, ties to even; a NaN stays one.
__device__ __forceinline__ uint16_t to_bfloat16(float value) {
    const uint32_t bits = __float_as_uint(value);
    if (value != value) return 0x7FFF;
    return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

__device__ __forceinline__ int dot4(int a, int b, int sum) {
    asm("dp4a.s32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
    return sum;
}

__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
    return bytes;
}

// Weights: read once a pass, so they need no room in the first cache. Zeros if `is_in` is false.
__device__ __forceinline__ uint4 stream16(const void* from, bool is_in) {
    uint4 v;
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %5, 0;"
        "mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;"
        "@p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];}"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from), "r"(static_cast<int>(is_in)));
    return v;
}

__device__ __forceinline__ uint32_t stream4(const void* from, bool is_in) {
    uint32_t v;
    asm volatile("{.reg .pred p; setp.ne.b32 p, %2, 0; mov.b32 %0, 0; @p ld.global.nc.L2::128B.u32 %0, [%1];}"
                 : "=r"(v) : "l"(from), "r"(static_cast<int>(is_in)));
    return v;
}

__device__ __forceinline__ uint32_t stream2(const void* from, bool is_in) {
    uint16_t v;
    asm volatile("{.reg .pred p; setp.ne.b32 p, %2, 0; mov.b16 %0, 0; @p ld.global.nc.L2::128B.u16 %0, [%1];}"
                 : "=h"(v) : "l"(from), "r"(static_cast<int>(is_in)));
    return v;
}

// Bytes that will be read soon, to the second cache; `from` need not be aligned.
__device__ __forceinline__ void fetch_ahead(const void* from, int64_t bytes) {
#if __CUDA_ARCH__ >= 900
    const uint64_t begin = reinterpret_cast<uint64_t>(from) & ~15ull;
    const uint64_t end = (reinterpret_cast<uint64_t>(from) + bytes + 15) & ~15ull;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;"
                 :: "l"(begin), "r"(static_cast<uint32_t>(end - begin)));
#endif
}

// What this kernel reads of the kernel before, and all it writes, comes after `await_inputs`: until
// then both may run at once (programmatic dependent launch).
__device__ __forceinline__ void release_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void await_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ float larger(float a, float b) {  // NaN if one of them is
    return a > b || a != a ? a : b;
}

// To the nearest, ties to even; beyond the largest an infinity.
__device__ __forceinline__ uint32_t to_half(float value) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

template <int WIDTH = kWarp>
__device__ __forceinline__ float sum_over(float value) {
#pragma unroll
    for (int step = WIDTH / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAll, value, step);
    return value;
}

// One block of token `t`, a lane for each value, to 8 bits (reference.py, `rounded`).
__device__ __forceinline__ void store_block(const Acts& to, int64_t t, int block, float value) {
    const int lane = threadIdx.x % kWarp;
    float top = fabsf(value);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) top = larger(top, __shfl_xor_sync(kAll, top, step));
    float scale = __fdiv_rn(top, 127.0f);
    if (scale < kTiny) scale = 0;
    const int code = scale == 0 ? 0 : __float2int_rn(value * __fdiv_rn(127.0f, top));
    int sum = code;
#pragma unroll
    for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
    const int second = __shfl_sync(kAll, sum, 16);
    const int64_t row = t * to.blocks;
    const int half = lane / 16;
    to.codes[((2 * t + half) * to.blocks + block) * 16 + lane % 16] = static_cast<uint8_t>(code);
    to.values[(row + block) * kBlock + lane] = value;
    if (lane == 0) {
        to.scales[row + block] = scale;
        to.sums[row + block] = (sum & 0xFFFF) | (second << 16);
    }
}

// The same of a stream `h` that a norm with weight `gain` stands before. The norm's divisor is
// common to a token: whoever multiplies takes it from `squares`.
__device__ __forceinline__ void store_normed(
    const Acts& to, int64_t t, int block, float h, const float* gain) {
    const int lane = threadIdx.x % kWarp;
    const int column = block * kBlock + lane;
    const float squares = sum_over(h * h);
    store_block(to, t, block, column < to.dim ? h * gain[column] : 0.0f);
    if (lane == 0) to.squares[t * to.blocks + block] = squares;
}

// What a product with token `t` is to be multiplied with, summed by one warp.
__device__ __forceinline__ float norm_factor(const Acts& x, int64_t t) {
    if (x.squares == nullptr) return 1.0f;
    float sum = 0;
    for (int i = threadIdx.x % kWarp; i < x.blocks; i += kWarp) sum += x.squares[t * x.blocks + i];
    return __fdiv_rn(1.0f, sqrtf(sum_over(sum) / static_cast<float>(x.dim) + x.eps));
}
