// h += what the processes of a group sent, each a part of one product (linear.cu, kSend).
//
// Two buffers take turns. A process sends to one of them again after the sum in between, for which
// it had to have the parts of all others: they had read the buffer by then.
#include "peers.cuh"

struct Gather {
    Acts out;              // what becomes of h, where `gain` is not null
    const uint64_t* from;  // (peers, `stride`), of which (T, dim) were sent
    float* h;              // (T, dim)
    const float* gain;     // of the norm that follows, or null
    const uint32_t* epoch;
    uint32_t* next;        // the other buffer's
    int64_t stride;
    int peers;
    int dim;
};

extern "C" __global__ void gather(const __grid_constant__ Gather a) {
    release_next();  // the next product's weights are on their way meanwhile
    const int64_t t = blockIdx.y;
    const int block = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
    const int column = block * kBlock + threadIdx.x % kWarp;
    const bool is_column = column < a.dim;
    const uint32_t epoch = epoch_of(a.epoch);
    float parts[kMostPeers];
#pragma unroll
    for (int i = 0; i < kMostPeers; ++i) {
        if (i < a.peers && is_column) parts[i] = await_word(a.from + i * a.stride + t * a.dim + column, epoch);
    }
    await_inputs();  // what is written from here on, the kernels before may read
    if (blockIdx.x == 0 && t == 0 && threadIdx.x == 0) *a.next = epoch + 1 == 0 ? 1 : epoch + 1;
    if (block * kBlock >= a.dim) return;
    float value = is_column ? a.h[t * a.dim + column] : 0.0f;
#pragma unroll
    for (int i = 0; i < kMostPeers; ++i) {  // in the same order everywhere
        if (i < a.peers && is_column) value += parts[i];
    }
    if (is_column) a.h[t * a.dim + column] = value;
    if (a.gain != nullptr) store_normed(a.out, t, block, value, is_column ? a.gain[column] : 0.0f);
}
