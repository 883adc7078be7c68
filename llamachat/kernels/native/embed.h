// Rows of a packed weight as float32: look-up of tokens.

#pragma once
#include "linear.h"

template <class V>
float scale_of(const uint16_t* scales, int64_t group, int64_t lane) {
    float values[kRows];
    V::store(values, V::load_f16(scales + group * kRows));
    return values[lane];
}

// The multiplier of column `k` of a panel's row `lane`.
inline float code_of(const Panels& part, const uint8_t* codes, int64_t lane, int64_t k) {
    const int64_t line_columns = part.form == kQ4 ? 8 : 4, at = k % line_columns;
    const uint8_t byte = codes[k / line_columns * 64 + lane * 4 + at % 4];
    if (part.form == kQ8) return static_cast<float>(static_cast<int8_t>(byte) + (part.mins ? 128 : 0));
    const int nibble = at < 4 ? byte & 15 : byte >> 4;
    return static_cast<float>(part.has_book ? part.book[nibble] : nibble - (part.mins ? 0 : 8));
}

template <class V>
void embed_row(const Panels& part, int64_t row, float* out) {
    const Panel panel = panel_of(part, row / kRows);
    const int64_t lane = row % kRows;
    if (is_float(part)) {
        for (int64_t k = 0; k < part.cols; ++k) {
            float values[kRows];
            V::store(values, part.form == kF32   ? load_value<V, kF32>(panel.codes, k * kRows)
                             : part.form == kF16 ? load_value<V, kF16>(panel.codes, k * kRows)
                                                 : load_value<V, kBF16>(panel.codes, k * kRows));
            out[k] = values[lane];
        }
        return;
    }
    for (int64_t group = 0; group * part.group < part.cols; ++group) {
        const float scale = scale_of<V>(panel.scales, group, lane);
        const float min = part.mins ? scale_of<V>(panel.mins, group, lane)
                                    : scale * shift_of(panel.scales[group * kRows + lane], part.shift);
        const int64_t end = smaller((group + 1) * part.group, part.cols);
        for (int64_t k = group * part.group; k < end; ++k)
            out[k] = part.unit * (scale * code_of(part, panel.codes, lane, k) + min);
    }
}

template <class V>
void embed(Pool& pool, const Embed& args) {
    const Panels& table = *args.table;
    const auto work = [&](int64_t t, int) { embed_row<V>(table, args.pass->ids[t], args.out + t * table.cols); };
    if (args.pass->n_tokens == 1) work(0, 0);
    else pool.all(args.pass->n_tokens, work);
}
