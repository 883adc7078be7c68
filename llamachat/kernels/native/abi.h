// The C ABI between Python (ctypes, kernels/native.py) and the kernels.
//
// Shapes: T new tokens, D dim, H heads, K kv heads, E head_dim, O x I a weight, S slots, B rows of
// the slot table. Python owns all memory that is named here; the pool owns its scratch.

#pragma once
#include <cstdint>

#ifdef _WIN32
#define LC_API __declspec(dllexport)
#else
#define LC_API __attribute__((visibility("default")))  // all else is hidden
#endif

extern "C" {

enum Form : int32_t { kQ4, kQ8, kF32, kF16, kBF16 };          // of a weight's codes
enum CacheForm : int32_t { kCacheF32, kCacheBF16, kCacheInt8 };
enum Mode : int32_t { kStore, kAdd, kSwiGLU };                // what becomes of a product

// An O x I matrix in panels of 16 rows. Columns come in blocks of 32 (the last one padded with
// zeros), a block in lines of 64 bytes: byte 4 r + i of a line belongs to row r.
//   kQ4: 4 lines; line j has columns 8 j + i in the low nibbles and 8 j + 4 + i in the high ones
//   kQ8: 8 lines; line j has columns 4 j + i, signed
//   floats: no blocks; 16 values, one of each row, for each column
// value = unit * (scale * v + min), where v is book[code] of kQ4 with `has_book`, else code - 8 of
// kQ4, or code of kQ4 with minimum; code of kQ8, or code + 128 of kQ8 with minimum. With a shift,
// v is book[code] + shift * (n - 8): n is the four lowest bits of the group's scale.
struct Panels {
    uint8_t* codes;          // (O / 16, blocks, lines, 64); floats (O / 16, I, 16)
    const uint16_t* scales;  // (O / 16, groups, 16) float16; null for floats
    const uint16_t* mins;    // like scales, or null
    int64_t rows, cols;      // O, I without padding
    int32_t form, group;     // columns that share a scale: 16 (2 * blocks groups), or a multiple of 32
    int32_t has_book, shift; // shift: 0 for none; only with a book, and without mins
    float unit;              // a power of two
    int8_t book[16];
};

// Parts stacked along O, each from a panel of its own. Of a gated weight there are two: gate, up.
struct Weight {
    const Panels* parts;
    const float* bias;  // (O) or null
    int64_t rows, cols;
    int32_t n_parts, gated;
};

// Slots lie in chunks, so that what a context has not reached yet is never touched:
// keys   (chunks, n_layers, K, chunk / 16, E, 16): 16 slots side by side, one line for each of E
// values (chunks, n_layers, K, chunk, E)
// int8: one float32 scale for each (chunks, n_layers, K, chunk), of keys and of values
struct Cache {
    void* keys;
    void* values;
    float* key_scales;
    float* value_scales;
    int64_t chunk;  // slots; a multiple of 16
    int32_t n_layers, n_kv_heads, head_dim, form;
};

// What changes from one pass to the next.
struct Pass {
    const int32_t *ids, *row, *slot, *seen, *position;  // (T)
    const int32_t* table;                               // (B, table_stride)
    const int32_t* wanted;                              // (n_wanted) of T
    int64_t n_tokens, n_wanted, table_stride;
};

struct Angles {
    const Pass* pass;
    const float* frequencies;  // (E / 2)
    float *cosines, *sines;    // (T, E / 2)
    int64_t half;              // E / 2
};

struct Embed {
    const Pass* pass;
    const Panels* table;  // (V, D)
    float* out;           // (T, D)
};

struct Gather {
    const Pass* pass;
    const float* x;  // (T, cols)
    float* out;      // (n_wanted, cols)
    int64_t cols;
};

struct Attention {
    const Pass* pass;
    const float* qkv;              // (T, (H + 2 K) E): q | k | v
    const float *cosines, *sines;  // (T, E / 2)
    const Cache* cache;
    float* out;  // (T, H E)
    int32_t n_heads, layer;
};

struct Linear {
    const float* x;     // (T, I)
    const float* norm;  // (I): RMSNorm x first; or null
    const Weight* weight;
    float* out;         // (T, O); (T, O / 2) for kSwiGLU
    int64_t n_tokens;
    float eps;
    int32_t mode;
};

// Floats to codes and scales, as QTensor has them. Codes of 4 bits are indices of `book`, the even
// column low, and their levels are shifted as in Panels; others are integers of up to 127.
struct Quantize {
    const float* x;   // (O, I), finite
    uint8_t* codes;   // (O, I), or (O, I / 2) with `has_book`
    uint16_t* scales; // (O, I / group) float16
    int64_t rows, cols;
    int32_t group, has_book, shift;  // group: a multiple of 16, at most 256, that divides I
    int8_t book[16];                 // ascending
};

enum OpKind : int64_t { kAngles, kEmbed, kGather, kAttention, kLinear };

// One step of a program; `args` is the structure of its kind.
struct Op {
    int64_t kind;
    const void* args;
};

// Where a program is: `unit` of work of operation `op`.
struct Progress {
    int64_t op, unit;
};

struct Pool;

LC_API const char* lc_isas();  // what was compiled in and this CPU has, best first, "," between
LC_API Pool* lc_pool_new(int32_t n_threads, const char* isa);  // null: no such instruction set, or no memory
LC_API void lc_pool_free(Pool* pool);

// Goes on with a program for about 30 ms. 0: it is done; 1: call again; -1: no memory.
LC_API int32_t lc_run(Pool* pool, const Op* ops, int64_t n_ops, Progress* progress);

// Fills panels->codes from rows: (O, I) bytes, (O, I / 2) nibbles with the even element low, or floats
// of the panels' form.
LC_API void lc_pack(Pool* pool, const uint8_t* rows, const Panels* panels);

LC_API void lc_quantize(Pool* pool, const Quantize* args);

LC_API double lc_read_bandwidth(Pool* pool, const uint8_t* bytes, int64_t n_bytes);  // GB/s
}
