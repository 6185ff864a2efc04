// Inverses without pivots: a block of 64 x 64 in registers, 4 x 4 a lane, one barrier a column; and from it R^-1 of R R^T =
// Gram for matrices of any size.
#pragma once

#include "tile.h"

namespace ssvdo {
namespace SSVDO_ISA {

template <class T, class Team>
struct Block64 {
    static constexpr int B = 64, part = lanes / Team::size, shared = 4 * B;  // elements: a row and a column, twice
    T x[part][4][4];

    // get(i, j): the matrix, size x size; continued by the identity.
    template <class Get>
    SSVDO_HD void load(const Team& team, int size, Get get) {
        for (int p = 0; p < part; p++) {
            const int lane = team.rank * part + p, ti = lane / 16 * 4, tj = lane % 16 * 4;
SSVDO_UNROLL
            for (int i = 0; i < 4; i++)
SSVDO_UNROLL
                for (int j = 0; j < 4; j++) {
                    const int m = ti + i, n = tj + j;
                    x[p][i][j] = m < size && n < size ? get(m, n) : T(m == n);
                }
        }
    }
    template <class Each>
    SSVDO_HD void store(const Team& team, Each each) const {
        for (int p = 0; p < part; p++) {
            const int lane = team.rank * part + p, ti = lane / 16 * 4, tj = lane % 16 * 4;
SSVDO_UNROLL
            for (int i = 0; i < 4; i++)
SSVDO_UNROLL
                for (int j = 0; j < 4; j++) each(ti + i, tj + j, x[p][i][j]);
        }
    }

    // Whole: A becomes A^-1 (Gauss-Jordan). Else the rows below each pivot alone are swept: of A = L D L^T, D stays on the
    // diagonal and L^-1 below it. Returns 0, or 1 + the column of a pivot that is not positive and finite (not Whole).
    template <bool Whole>
    SSVDO_HD int eliminate(const Team& team, T* shared) {
        for (int q = 0; q < B; q += 4)
SSVDO_UNROLL
            for (int s = 0; s < 4; s++) {
                const int pivot = q + s;
                T *row = shared + s % 2 * 2 * B, *column = row + B;
                for (int p = 0; p < part; p++) {
                    const int lane = team.rank * part + p, ti = lane / 16 * 4, tj = lane % 16 * 4;
SSVDO_UNROLL
                    for (int j = 0; j < 4; j++) {
                        if (ti == q) row[tj + j] = x[p][s][j];
                        if (tj == q) column[ti + j] = x[p][j][s];
                    }
                }
                team.sync();
                const T inverse = T(1) / row[pivot];
                if (!Whole && !(row[pivot] > T(0) && row[pivot] - row[pivot] == T(0))) return pivot + 1;
                for (int p = 0; p < part; p++) {
                    const int lane = team.rank * part + p, ti = lane / 16 * 4, tj = lane % 16 * 4;
                    T a[4], b[4];
SSVDO_UNROLL
                    for (int i = 0; i < 4; i++) {
                        a[i] = Whole || ti + i > pivot ? column[ti + i] : T(0);
                        b[i] = row[tj + i] * inverse;
                    }
                    if (Whole && ti == q) {
                        a[s] = T(-1);
SSVDO_UNROLL
                        for (int j = 0; j < 4; j++) x[p][s][j] = T(0);
                    }
                    if (tj == q) {
                        b[s] = inverse;
SSVDO_UNROLL
                        for (int i = 0; i < 4; i++)
                            if (Whole || ti + i > pivot) x[p][i][s] = T(0);
                    }
SSVDO_UNROLL
                    for (int i = 0; i < 4; i++)
SSVDO_UNROLL
                        for (int j = 0; j < 4; j++) x[p][i][j] -= a[i] * b[j];
                }
            }
        return 0;
    }
};

// X = R^-T (l x l, upper triangular) of R R^T = gram, of which the lower triangle is read; `work`: l x l. By one team, in
// blocks of 64. Returns 0, or 1 + the column of the pivot that is not positive and finite; X is left undefined then.
template <class T, class Team>
SSVDO_HD int inverse_factor(const Team& team, unsigned char* memory, const T* gram, T* work, T* X, int l) {
    using Block = Block64<T, Team>;
    using Product = Sums<T, 64, Team>;
    constexpr int B = Block::B;
    // Rows of blocks are swept as a block is: on and above the diagonal of `work` lies what is left of the matrix, below it
    // the inverse. A row is done when its own block is R_pp^-1, and by that the whole row has been multiplied.
    for (int e = team.rank; e < l * l; e += Team::size) work[e] = e % l <= e / l ? gram[e] : gram[e % l * l + e / l];
    team.sync();
    for (int p0 = 0; p0 < l; p0 += B) {
        const int b = l - p0 < B ? l - p0 : B;
        T* own = work + ptrdiff_t(p0) * l + p0;
        T* small = reinterpret_cast<T*>(memory);
        Block block;
        block.load(team, b, [&](int i, int j) { return own[ptrdiff_t(i) * l + j]; });
        const int bad = block.template eliminate<false>(team, small);
        team.sync();
        if (bad) return p0 + bad;
        block.store(team, [&](int i, int j, T value) {
            if (i == j) small[i] = T(1) / root(value);
        });
        team.sync();
        block.store(team, [&](int i, int j, T value) {
            if (i < b && j < b) own[ptrdiff_t(i) * l + j] = i == j ? small[i] : i > j ? value * small[i] : T(0);
        });
        team.sync();
        const Matrix<T> inverse(own, b, b, l, true);
        const auto multiply = [&](const auto& left, const Matrix<T>& right, int m0, int n0, auto each) {
            Product sums;
            sums.clear();
            sums.add(team, memory, m0, n0, 0, b, left, right);
            sums.store(team, [&](int m, int n, T sum) {
                if (m0 + m < left.lines && n0 + n < l) each(m0 + m, n0 + n, sum);
            });
        };
        // In two rounds, so that nobody reads what is written: `X` takes the row meanwhile.
        const Matrix<T> band(work + ptrdiff_t(p0) * l, l, b, l, false);
        for (int j = 0; j < l; j += B)
            if (j != p0) multiply(inverse, band, 0, j, [&](int m, int n, T sum) { X[ptrdiff_t(m) * l + n] = sum; });
        team.sync();
        for (int e = team.rank; e < b * l; e += Team::size)
            if (e % l < p0 || e % l >= p0 + b) work[ptrdiff_t(p0) * l + e] = X[e];
        team.sync();
        for (int i = p0 + B; i < l; i += B)
            for (int j = 0; j < l; j += B)
                multiply(band, band, i, j, [&](int m, int n, T sum) {
                    T& at = work[ptrdiff_t(m) * l + n];
                    at = j == p0 ? -sum : at - sum;
                });
        team.sync();
    }
    for (int e = team.rank; e < l * l; e += Team::size) X[e] = e / l <= e % l ? work[ptrdiff_t(e % l) * l + e / l] : T(0);
    team.sync();
    return 0;
}

}  // namespace SSVDO_ISA
}  // namespace ssvdo
