// Attention of a few tokens, a kernel for each layer; of prompts, what comes before it.
// Compiled for HEAD_DIM, HEADS and CACHE.
#define WARPS 16
#include "attention.cuh"

extern "C" __global__ void store(const __grid_constant__ Attention a) {
    release_next();
    await_inputs();
    const int kv_head = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
    if (kv_head < a.kv_heads) append(a, blockIdx.y, kv_head);
}

// Turned queries as bfloat16 (T, H, E) to `partial`; a thread for eight elements.
extern "C" __global__ void turn(const __grid_constant__ Attention a) {
    release_next();
    await_inputs();
    const int at = 8 * (blockIdx.x * blockDim.x + threadIdx.x), width = a.heads * HEAD_DIM;
    if (at >= width) return;
    float q[8];
    turned8(a, blockIdx.y, at / HEAD_DIM, at % HEAD_DIM, q);
    uint16_t* to = reinterpret_cast<uint16_t*>(a.partial) + static_cast<int64_t>(blockIdx.y) * width + at;
    *reinterpret_cast<uint4*>(to) = bfloat16s(q);
}

extern "C" __global__ void __launch_bounds__(kWarps * kWarp) attend(const __grid_constant__ Attention a) {
    release_next();
    attend_tile(a, blockIdx.x, blockIdx.y, blockIdx.z, [] { await_inputs(); });
}

extern "C" __global__ void combine(const __grid_constant__ Attention a) {
    release_next();
    await_inputs();
    const int block = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
    if (block < a.out.blocks) combine_block(a, blockIdx.y, block);
}
