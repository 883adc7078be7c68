// What every kernel shares: conversions, sums over a warp, activations at 8 bits.
//
// No headers are needed, so that NVRTC alone compiles all of it. Each kernel takes one structure
// by value; structures.py has the same for ctypes.
#pragma once

#ifdef __CUDACC__
#include "ptx.cuh"
#else
#include "emulated.h"  // the tests run kernels on the CPU
#endif

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

__device__ __forceinline__ float of_bfloat16(uint32_t bits) { return __uint_as_float(bits << 16); }

__device__ __forceinline__ uint16_t to_bfloat16(float value) {
    return static_cast<uint16_t>(pack_bfloat16(value, 0.0f));
}

__device__ __forceinline__ uint4 bfloat16s(const float (&x)[8]) {
    return make_uint4(pack_bfloat16(x[0], x[1]), pack_bfloat16(x[2], x[3]),
                      pack_bfloat16(x[4], x[5]), pack_bfloat16(x[6], x[7]));
}

__device__ __forceinline__ float larger(float a, float b) {  // NaN if one of them is
    return a > b || a != a ? a : b;
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

// The same of a stream `h` that a norm stands before, with weight `gain` (0 beyond the last). The
// norm's divisor is common to a token: whoever multiplies takes it from `squares`.
__device__ __forceinline__ void store_normed(const Acts& to, int64_t t, int block, float h, float gain) {
    const float squares = sum_over(h * h);
    store_block(to, t, block, h * gain);
    if (threadIdx.x % kWarp == 0) to.squares[t * to.blocks + block] = squares;
}

// A lane's of 32 sums of squares of token `t`, and 0 beyond the last.
__device__ __forceinline__ float square_of(const Acts& x, int64_t t, int from) {
    const int block = from + threadIdx.x % kWarp;
    return block < x.blocks ? __ldcg(x.squares + t * x.blocks + block) : 0.0f;
}

// A lane's part of all of them, and what products with the token are to be multiplied with.
__device__ __forceinline__ float lane_squares(const Acts& x, int64_t t) {
    float sum = 0;
    if (x.squares == nullptr) return sum;
    for (int from = 0; from < x.blocks; from += kWarp) sum += square_of(x, t, from);
    return sum;
}

__device__ __forceinline__ float norm_factor(const Acts& x, float squares) {
    if (x.squares == nullptr) return 1.0f;
    return __fdiv_rn(1.0f, sqrtf(sum_over(squares) / static_cast<float>(x.dim) + x.eps));
}
