// Indices of the packed strict upper triangle of a skew matrix, row by row, and the mixer's elements.
#pragma once

#include "team.h"

namespace ssvdo {
namespace SSVDO_ISA {

// Where row i of the strict upper triangle of a k x k matrix begins, less its first column: K(i, j) is at + j, j > i.
SSVDO_HD ptrdiff_t packed_row(int i, int k) { return ptrdiff_t(i) * (2 * k - i - 1) / 2 - i - 1; }

// Sizes of a mixer M ((width + l + q) x width) = [N; B_z] of preparation.py.
struct MixerShape {
    int k, l, q, width;
    SSVDO_HD int rows() const { return width + l + q; }
};

// One row of M: factor * (row `source` of G, k long), plus `value` at column `at`; source < 0: no such row.
template <class T>
struct MixerRow {
    int source, at;
    T factor, value;
};

// S: singular values (width); dS: k.
template <class T>
SSVDO_HD MixerRow<T> mixer_row(const MixerShape& s, const T* S, const T* dS, int row) {
    const auto scale = [&](int i) { return S[i] + dS[i]; };
    if (row < s.width) {  // N = diag(1 / S) B - I; no row where S_i has no usable inverse, none beyond k
        if (row >= s.k - s.q) return {-1, 0, T(0), T(0)};
        return {row, row, scale(row) / S[row], T(-1)};
    }
    row -= s.width;
    if (row < s.l) {  // B[:l], padded with diag(S) where l > k
        if (row < s.k) return {row, 0, scale(row), T(0)};
        return {-1, row, T(0), S[row]};
    }
    row += s.k - s.q - s.l;  // the null space's rows of B - diag(S)
    return {row, row, scale(row), -S[row]};
}

// Element i < k of a column of dB from that column of dM: the adjoint of the above. dM: its first element; step: from
// row to row.
template <class T>
SSVDO_HD T inner_gradient(const MixerShape& s, const T* dM, ptrdiff_t step, const T* S, int i) {
    T sum = i < s.k - s.q ? dM[i * step] / S[i] : dM[(s.width + s.l + i - s.k + s.q) * step];
    return i < s.l ? sum + dM[(s.width + i) * step] : sum;
}

}  // namespace SSVDO_ISA
}  // namespace ssvdo
