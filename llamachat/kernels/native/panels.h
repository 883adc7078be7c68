// How a weight lies in memory; see Panels in abi.h.

#pragma once
#include "abi.h"

constexpr int64_t kBlock = 32;  // columns that share an activation scale
constexpr int64_t kRows = 16;   // of a panel

// One panel of a part.
struct Panel {
    const uint8_t* codes;
    const uint16_t *scales, *mins;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

inline bool is_float(const Panels& part) { return part.form >= kF32; }
inline int64_t panels_of(const Panels& part) { return ceil_div(part.rows, kRows); }
inline int64_t blocks_of(int64_t cols) { return ceil_div(cols, kBlock); }
inline int64_t groups_of(const Panels& part) {
    return part.group == 16 ? 2 * blocks_of(part.cols) : ceil_div(part.cols, part.group);
}
inline int64_t panel_bytes(const Panels& part) {
    if (is_float(part)) return part.cols * kRows * (part.form == kF32 ? 4 : 2);
    return blocks_of(part.cols) * kRows * kBlock / (part.form == kQ4 ? 2 : 1);
}
inline Panel panel_of(const Panels& part, int64_t index) {
    const int64_t at = part.scales ? index * groups_of(part) * kRows : 0;
    return {part.codes + index * panel_bytes(part), part.scales + at, part.mins ? part.mins + at : nullptr};
}

// Of a group whose float16 scale has these bits: what its levels are shifted by.
constexpr int kShiftBits = 4, kNoShift = 1 << (kShiftBits - 1);
inline float shift_of(uint16_t scale, int32_t shift) {
    return static_cast<float>(shift * ((scale & ((1 << kShiftBits) - 1)) - kNoShift));
}
