// Floats to codes: for each group the scale is searched that errs least, at 4 bits with the shift of
// its levels. The search is that of quant/quantize.py, step by step; only sums are in another order.
//
// LANES neighbours in a warp have a group, VALUES of it each, and find the same scale. Compiled for
// values of TYPE, which FLOAT makes a float of; BITS of a code; and the levels that quant/form.py
// has: BOOK, SHIFT.
#include "common.cuh"

constexpr int kLevels = 16;
__device__ constexpr float kBook[kLevels] = {BOOK};
__device__ constexpr float kParts[] = {1.0f, 0.92f};  // of the scale that clips nothing
constexpr float kTop = 127.0f;                        // the largest code of 8 bits
constexpr int kScales = 31;                           // of 8 bits that are tried, 0.2 % apart
constexpr int kAround = 3;                            // shifts on either side that are tried
constexpr int kNoShift = 8;                           // the number that a scale has then
constexpr int kRefinements = 3;
constexpr int kLargestHalf = 0x7BFF;
constexpr int kUnit = 8;  // values that are read at once

struct alignas(16) Values {
    TYPE bits[kUnit];
};

struct alignas(BITS) Codes {
    uint8_t bytes[BITS];
};

struct Quantize {
    const Values* x;   // (groups, LANES * VALUES)
    Codes* codes;      // the same; of 4 bits two in a byte, the even one low
    uint16_t* scales;  // float16 (groups)
    int64_t groups;
};

constexpr int kUnits = VALUES / kUnit;  // of a lane; those of a group alternate between its lanes

__device__ __forceinline__ float or_one(float divisor) { return divisor == 0 ? 1.0f : divisor; }

__device__ __forceinline__ float largest_over(float value) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(kAll, value, step));
    return value;
}

// Which entry of the book is nearest.
__device__ __forceinline__ int number_of(float z) {
    int number = 0;
#pragma unroll
    for (int i = 0; i + 1 < kLevels; ++i) number += z >= (kBook[i] + kBook[i + 1]) / 2;
    return number;
}

// The level nearest to z, a multiple of the scale.
__device__ __forceinline__ float level_of(float z, float shift) {
    if constexpr (BITS == 8) return fminf(fmaxf(rintf(z), -kTop), kTop);
    float level = kBook[0];
#pragma unroll
    for (int i = 0; i + 1 < kLevels; ++i)
        if (z - shift >= (kBook[i] + kBook[i + 1]) / 2) level += kBook[i + 1] - kBook[i];
    return level + shift;
}

// The nearest float16; at 4 bits the nearest whose lowest four bits say the shift.
__device__ __forceinline__ int half_of(float scale, int steps) {
    const int half = to_half(scale);
    int size = min(half & 0x7FFF, kLargestHalf);
    if constexpr (BITS == 4) {
        size = max((size - steps) >> 4, 0) * 16 + steps + kNoShift;
        if (size > kLargestHalf) size -= 16;
    }
    return (half & 0x8000) | size;
}

// How levels v fit values x under the best scale for them, by least squares.
struct Fit {
    float product = 0, square = 0;  // sum x v, sum v^2

    __device__ void add(float x, float v) { product += x * v, square += v * v; }
    __device__ Fit total() const { return {sum_over<LANES>(product), sum_over<LANES>(square)}; }
    __device__ float scale() const { return product / or_one(square); }
    __device__ float score() const { return product * product / or_one(square); }
};

class Search {
  public:
    __device__ explicit Search(const float (&x)[kUnits][kUnit]) : x_(x) {
        float low = 0, high = 0;
        each([&](float x) { low = fminf(low, x), high = fmaxf(high, x); });
        low = -largest_over(-low), high = largest_over(high);
        const float first = (high >= -low ? high : low) / (BITS == 8 ? kTop : kBook[0]);
        consider(first, 0);
        if constexpr (BITS == 8) try_scales(first);
        else try_shifts(low, high);
        float scale = best_scale_;
#pragma unroll 1
        for (int i = 0; i < kRefinements; ++i) scale = consider(scale, best_steps_);
        if ((to_half(first) & 0x7FFF) == 0) half = shift_steps = 0;
    }

    int half = 0;         // the scale
    int shift_steps = 0;  // multiples of SHIFT

  private:
    template <class Action>
    __device__ __forceinline__ void each(Action act) const {
        for (int unit = 0; unit < kUnits; ++unit) {
#pragma unroll
            for (int i = 0; i < kUnit; ++i) act(x_[unit][i]);
        }
    }

    __device__ void try_scales(float first) {
#pragma unroll 1
        for (int i = 0; i < kScales; ++i) attempt(first / static_cast<float>(1 - 0.002 * i), 0);
    }

    // With either sign: shifts around the one under which both the least value and the largest are
    // outer levels.
    __device__ void try_shifts(float low, float high) {
        constexpr float bottom = kBook[0], top = kBook[kLevels - 1];
#pragma unroll 1
        for (int sign = 1; sign >= -1; sign -= 2) {
            const float least = sign > 0 ? low : -high, most = sign > 0 ? high : -low;
            const float fitting = (least / or_one((most - least) / (top - bottom)) - bottom) / SHIFT;
            const float middle = fminf(fmaxf(rintf(fitting), kAround - kNoShift), kNoShift - 1 - kAround);
#pragma unroll 1
            for (int i = 0; i < 2 * (2 * kAround + 1); ++i) {
                const int steps = static_cast<int>(middle) + i / 2 - kAround;
                const float shift = static_cast<float>(steps * SHIFT);
                const float whole = fmaxf(least / (bottom + shift), most / (top + shift));
                attempt(static_cast<float>(sign) * whole * kParts[i % 2], steps);
            }
        }
    }

    // Takes the scale that fits best to the codes of this one, if they are the best so far.
    __device__ __forceinline__ void attempt(float scale, int steps) {
        const float divisor = or_one(scale), shift = static_cast<float>(steps * SHIFT);
        Fit fit;
        each([&](float x) { fit.add(x, level_of(x / divisor, shift)); });
        fit = fit.total();
        if (fit.score() > score_) score_ = fit.score(), best_scale_ = fit.scale(), best_steps_ = steps;
    }

    // Keeps the scale, as float16 has it, if it errs less; returns the best one for its codes.
    __device__ __forceinline__ float consider(float scale, int steps) {
        const int rounded = half_of(scale, steps);
        const float exact = of_half(rounded), shift = static_cast<float>(steps * SHIFT);
        Fit fit;
        float error = 0;
        each([&](float x) {
            const float v = level_of(x / or_one(exact), shift), off = x - exact * v;
            fit.add(x, v), error += off * off;
        });
        error = sum_over<LANES>(error);
        if (error < least_) least_ = error, half = rounded, shift_steps = steps;
        return fit.total().scale();
    }

    const float (&x_)[kUnits][kUnit];
    float score_ = 0, best_scale_ = 0;  // of what was tried
    int best_steps_ = 0;
    float least_ = __int_as_float(0x7F800000);  // error
};

extern "C" __global__ void quantize(const __grid_constant__ Quantize a) {
    release_next();
    await_inputs();
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const bool is_in = thread / LANES < a.groups;  // others do the last group again
    const int64_t group = is_in ? thread / LANES : a.groups - 1;
    const int lane = thread % LANES;
    const int64_t first = group * LANES * kUnits + lane;
    float x[kUnits][kUnit];
    for (int unit = 0; unit < kUnits; ++unit) {
        const Values read = a.x[first + unit * LANES];
#pragma unroll
        for (int i = 0; i < kUnit; ++i) x[unit][i] = FLOAT(read.bits[i]);
    }
    const Search found(x);
    if (!is_in) return;
    const float divisor = or_one(of_half(found.half));
    for (int unit = 0; unit < kUnits; ++unit) {
        Codes codes;
#pragma unroll
        for (int i = 0; i < BITS; ++i) {
            if constexpr (BITS == 8) {
                codes.bytes[i] = static_cast<uint8_t>(static_cast<int>(level_of(x[unit][i] / divisor, 0)));
            } else {
                const float shift = static_cast<float>(found.shift_steps * SHIFT);
                const int even = number_of(x[unit][2 * i] / divisor - shift);
                codes.bytes[i] = even | number_of(x[unit][2 * i + 1] / divisor - shift) << 4;
            }
        }
        a.codes[first + unit * LANES] = codes;
    }
    if (lane == 0) a.scales[group] = static_cast<uint16_t>(found.half);
}
