// The outer part's kernels: products of frozen matrices with columns, and a Cholesky factor with its inverse. How
// ssvdo_kernels/ops/outer.py and complement.py put them together is theirs alone.
#pragma once

#include "../core/factor.h"
#include "../core/tile.h"
#include "api.h"

namespace ssvdo {
namespace SSVDO_ISA {

// out = A B, a team a tile. A is stored as S and by rows, or by columns; B likewise. Every number of S is one of T, so
// that a product errs by the roundings of its sums alone.
template <class T, class S, bool LeftByRows, bool RightByRows>
struct ProductKernel {
    using Shape = Large<T>;
    static constexpr int min_blocks = 2;
    ProductGroup<T> g;

    SSVDO_HD int across() const { return (g.columns + Shape::N - 1) / Shape::N; }
    int count() const { return (g.rows + Shape::M - 1) / Shape::M * across(); }
    int shared() const { return Shape::shared; }

    template <class Team>
    SSVDO_HD void operator()(const Team& team, int tile, int layer, T* shared) const {
        const int m0 = tile / across() * Shape::M, n0 = tile % across() * Shape::N;
        const Matrix<T, S, LeftByRows> A{static_cast<const S*>(g.left[layer]), g.rows, g.inner, g.left_layout.ld};
        const Matrix<T, T, RightByRows> B{g.right[layer], g.inner, g.columns, g.right_layout.ld};
        Sums<Shape, Team> sums;
        sums.clear();
        sums.add(team, shared, m0, n0, g.inner, A, B);
        T* out = g.out[layer];
        sums.store(team, [&](int m, int n, T sum) {
            m += m0, n += n0;
            if (m < g.rows && n < g.columns) out[ptrdiff_t(m) * g.ld + n] = sum;
        });
    }
};

// R R^T = gram and R^-1, a team a layer; R lies in shared memory where that is large enough.
template <class T>
struct FactorKernel {
    static constexpr int min_blocks = 2;
    FactorGroup<T> g;
    bool in_shared;
    SSVDO_HD int leading() const { return in_shared ? g.l | 1 : g.l; }  // odd: no two rows of a column in one bank
    int shared() const { return in_shared ? g.l * leading() : 1; }
    int count() const { return 1; }

    template <class Team>
    SSVDO_HD void operator()(const Team& team, int, int layer, T* shared) const {
        const int l = g.l, ld = leading();
        const int square = l * l;
        const ptrdiff_t at = ptrdiff_t(layer) * square;
        T* R = in_shared ? shared : g.work + at;
        for (int e = team.rank; e < square; e += team.size) R[ptrdiff_t(e / l) * ld + e % l] = g.gram[at + e];
        team.sync();
        const int info = cholesky(team, R, l, ld);
        if (team.rank == 0) g.info[layer] = info;
        if (!info) return inverse_lower(team, R, ld, g.inverse + at, l);
        for (int e = team.rank; e < square; e += team.size) g.inverse[at + e] = T(NAN);  // nothing like a result
    }
};

}  // namespace SSVDO_ISA
}  // namespace ssvdo
