// The C ABI, and the choice of an instruction set at run time.

#include <chrono>
#include <cmath>
#include <cstring>
#include <new>

#include "kernel.h"
#include "pool.h"

#if defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace {

struct Candidate {
    const Kernel* kernel;
    bool (*runs)();
};

#if defined(__x86_64__)
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#ifdef LC_HAVE_AVXVNNI
bool has_avxvnni() { return has_avx2() && __builtin_cpu_supports("avxvnni"); }
#endif
bool has_avx512vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#ifdef LC_HAVE_AVX512BF16
bool has_avx512bf16() { return has_avx512vnni() && __builtin_cpu_supports("avx512bf16"); }
#endif
#endif

#if defined(__aarch64__)
bool has_dotprod() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) & (1 << 20);  // HWCAP_ASIMDDP
#else
    return true;  // Apple's M1 and later have it
#endif
}
#endif

bool always() { return true; }

// The best first.
const Candidate kCandidates[] = {
#ifdef LC_HAVE_AVX512BF16
    {&kernel_avx512bf16, has_avx512bf16},
#endif
#ifdef LC_HAVE_AVX512VNNI
    {&kernel_avx512vnni, has_avx512vnni},
#endif
#ifdef LC_HAVE_AVX512
    {&kernel_avx512, has_avx512},
#endif
#ifdef LC_HAVE_AVXVNNI
    {&kernel_avxvnni, has_avxvnni},
#endif
#ifdef LC_HAVE_AVX2
    {&kernel_avx2, has_avx2},
#endif
#ifdef LC_HAVE_NEON
    {&kernel_neon, has_dotprod},
#endif
    {&kernel_scalar, always},
};

void angles(const Angles& args) {
    for (int64_t t = 0; t < args.pass->n_tokens; ++t)
        for (int64_t i = 0; i < args.half; ++i) {
            const float angle = static_cast<float>(args.pass->position[t]) * args.frequencies[i];
            args.cosines[t * args.half + i] = std::cos(angle);
            args.sines[t * args.half + i] = std::sin(angle);
        }
}

void gather(const Gather& args) {
    const size_t n_bytes = static_cast<size_t>(args.cols) * sizeof(float);
    for (int64_t i = 0; i < args.pass->n_wanted; ++i)
        std::memcpy(args.out + i * args.cols, args.x + args.pass->wanted[i] * args.cols, n_bytes);
}

// From the unit of work to begin with to the one to go on with; 0: done, -1: no memory.
int64_t step(Pool& pool, const Op& op, int64_t from) {
    switch (op.kind) {
        case kLinear: return pool.kernel->linear(pool, *static_cast<const Linear*>(op.args), from);
        case kAttention: return pool.kernel->attention(pool, *static_cast<const Attention*>(op.args), from);
        case kEmbed: pool.kernel->embed(pool, *static_cast<const Embed*>(op.args)); return 0;
        case kAngles: angles(*static_cast<const Angles*>(op.args)); return 0;
        default: gather(*static_cast<const Gather*>(op.args)); return 0;
    }
}

}  // namespace

const char* lc_isas() {
    static char names[128];
    if (!names[0])
        for (const auto& candidate : kCandidates)
            if (candidate.runs()) std::strcat(std::strcat(names, names[0] ? "," : ""), candidate.kernel->name);
    return names;
}

Pool* lc_pool_new(int32_t n_threads, const char* isa) {
    for (const auto& candidate : kCandidates)
        if (!std::strcmp(candidate.kernel->name, isa) && candidate.runs())
            return new (std::nothrow) Pool(n_threads, candidate.kernel);
    return nullptr;
}

void lc_pool_free(Pool* pool) { delete pool; }

int32_t lc_run(Pool* pool, const Op* ops, int64_t n_ops, Progress* progress) {
    pool->begin_slice();
    while (progress->op < n_ops) {
        const int64_t next = step(*pool, ops[progress->op], progress->unit);
        if (next < 0) return -1;
        progress->unit = next;
        if (next == 0) ++progress->op;
        if (pool->slice_is_over()) return progress->op < n_ops;
    }
    return 0;
}

void lc_quantize(Pool* pool, const Quantize* args) { pool->kernel->quantize(*pool, *args); }

double lc_read_bandwidth(Pool* pool, const uint8_t* bytes, int64_t n_bytes) {
    constexpr int64_t kUnit = 1 << 20;
    const auto start = std::chrono::steady_clock::now();
    pool->all(n_bytes / kUnit, [&](int64_t unit, int) { pool->kernel->read(bytes + unit * kUnit, kUnit); });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    return static_cast<double>(n_bytes / kUnit * kUnit) / seconds.count() / 1e9;
}
