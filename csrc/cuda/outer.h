// The outer part's kernels: L -> R^-1 and F = U_l' - U_l, and back. The equations are in ssvdo_kernels/ops/preparation.py;
// transposed to their tall side, so that one tile serves all:
//
//     forward    [left; gram] = [Y_bot | L]^T L       R R^T = gram + tau I,  X = R^-T       right = -left X
//                F = Y right + U (sqrt(tau) X - I) + [0; L X]
//     backward   right = Y^T dF,  dX = L^T dF_bot + sqrt(tau) U^T dF - left^T right,  dQ = dF_bot - Y_bot right
//                S = dGram + dGram^T from dX (core/factor.h),  dL = dQ X^T + L S
#pragma once

#include "../core/factor.h"
#include "../core/tile.h"
#include "api.h"

namespace ssvdo {
namespace SSVDO_ISA {

SSVDO_HD int tiles(int size, int tile) { return (size + tile - 1) / tile; }

template <class T>
struct OuterKernel {
    using Shape = Large<T>;
    static constexpr int min_blocks = 2;
    OuterGroup<T> g;

    SSVDO_HD int across() const { return tiles(g.l, Shape::N); }
    SSVDO_HD int down(int rows) const { return tiles(rows, Shape::M); }
    SSVDO_HD ptrdiff_t square() const { return ptrdiff_t(g.l) * g.l; }
    SSVDO_HD ptrdiff_t tall() const { return ptrdiff_t(g.r) * g.l; }
    SSVDO_HD int d() const { return g.large - g.c; }
    template <class S>
    SSVDO_HD const S* Y(int layer) const { return static_cast<const S*>(g.reflector[layer]); }
    template <class S>
    SSVDO_HD const S* Y_bottom(int layer) const { return Y<S>(layer) + ptrdiff_t(d()) * g.r; }
    template <class S>
    SSVDO_HD const S* U(int layer) const { return static_cast<const S*>(g.basis[layer]); }
    SSVDO_HD const T* dF_bottom(int layer) const { return g.columns[layer] + ptrdiff_t(d()) * g.ld; }
    SSVDO_HD auto L(int layer) const { return matrix<T>(g.outer[layer], g.c, g.l, g.l, g.scale); }
    SSVDO_HD auto L_transposed(int layer) const { return transposed<T>(g.outer[layer], g.l, g.c, g.l, g.scale); }
    SSVDO_HD auto X(int layer) const { return transposed<T>(static_cast<const T*>(g.inverse[layer]), g.l, g.l, g.l); }
    SSVDO_HD auto X_transposed(int layer) const { return matrix<T>(static_cast<const T*>(g.inverse[layer]), g.l, g.l, g.l); }
    int shared() const { return Shape::shared; }
};

// each(m, n, sum) for this worker's elements of the tile that lie inside of rows x columns.
template <class Sums, class Team, class Place, class Each>
SSVDO_HD void store_inside(const Sums& sums, const Team& team, const Place& at, int rows, int columns, Each each) {
    sums.store(team, [&](int m, int n, auto sum) {
        m += at.m0, n += at.n0;
        if (m < rows && n < columns) each(m, n, sum);
    });
}

// A tile's rows m0, columns n0 of the first `rows`, or of the l rows that follow.
struct Place {
    bool first;
    int m0, n0;
};
template <class Shape>
SSVDO_HD Place place(int tile, int rows, int across) {
    const int m = tile / across, first = tiles(rows, Shape::M);
    return {m < first, (m < first ? m : m - first) * Shape::M, tile % across * Shape::N};
}

template <class T, class S>
struct GramKernel : OuterKernel<T> {
    using typename OuterKernel<T>::Shape;
    int count() const { return (this->down(this->g.r) + this->down(this->g.l)) * this->across(); }
    template <class Team>
    SSVDO_HD void operator()(const Team& team, int tile, int layer, T* shared) const {
        const auto& g = this->g;
        const Place at = place<Shape>(tile, g.r, this->across());
        Sums<Shape, Team> sums;
        sums.clear();
        if (at.first)
            sums.add(team, shared, at.m0, at.n0, g.c, transposed<T>(this->template Y_bottom<S>(layer), g.r, g.c, g.r),
                     this->L(layer));
        else
            sums.add(team, shared, at.m0, at.n0, g.c, this->L_transposed(layer), this->L(layer));
        T* to = at.first ? g.left[layer] : g.gram + layer * this->square();
        const int rows = at.first ? g.r : g.l, l = g.l;
        store_inside(sums, team, at, rows, l, [&](int m, int n, T sum) { to[ptrdiff_t(m) * l + n] = sum; });
    }
};

// One team a layer.
template <class T>
struct FactorKernel : OuterKernel<T> {
    bool in_shared;
    int leading() const { return this->g.l | 1; }  // odd: no two rows of a column in one bank
    int shared() const { return in_shared ? this->g.l * leading() : 1; }
    int count() const { return 1; }
    template <class Team>
    SSVDO_HD void operator()(const Team& team, int, int layer, T* shared) const {
        const auto& g = this->g;
        const int l = g.l, ld = in_shared ? l | 1 : l;
        T* gram = g.gram + layer * this->square();
        T* R = in_shared ? shared : gram;
        for (int e = team.rank; e < l * l; e += team.size) {
            const int i = e / l, j = e % l;
            R[ptrdiff_t(i) * ld + j] = gram[e] + (i == j ? g.tau : T(0));
        }
        team.sync();
        const int info = cholesky(team, R, l, ld);
        T* inverse = g.inverse[layer];
        if (team.rank == 0) g.info[layer] = info;
        if (!info) return inverse_lower(team, R, ld, inverse, l, 1, l);
        for (int e = team.rank; e < l * l; e += team.size) inverse[e] = T(NAN);  // nothing that looks like a result
    }
};

template <class T>
struct TurnKernel : OuterKernel<T> {  // right = -left X
    using typename OuterKernel<T>::Shape;
    int count() const { return this->down(this->g.r) * this->across(); }
    template <class Team>
    SSVDO_HD void operator()(const Team& team, int tile, int layer, T* shared) const {
        const auto& g = this->g;
        const Place at = place<Shape>(tile, g.r, this->across());
        Sums<Shape, Team> sums;
        sums.clear();
        sums.add(team, shared, at.m0, at.n0, g.l, matrix<T>(static_cast<const T*>(g.left[layer]), g.r, g.l, g.l),
                 this->X(layer));
        const int r = g.r, l = g.l;
        T* to = g.right + layer * this->tall();
        store_inside(sums, team, at, r, l, [&](int m, int n, T sum) { to[ptrdiff_t(m) * l + n] = -sum; });
    }
};

template <class T, class S>
struct ColumnsKernel : OuterKernel<T> {
    using typename OuterKernel<T>::Shape;
    int count() const { return this->down(this->g.large) * this->across(); }

    struct Turned {  // sqrt(tau) X - I
        static constexpr bool row_major = false;
        const T* inverse;
        int l;
        T root_tau;
        SSVDO_HD T operator()(int i, int j) const {
            return i < l && j < l ? root_tau * inverse[ptrdiff_t(j) * l + i] - (i == j ? T(1) : T(0)) : T(0);
        }
    };
    struct Lowered {  // [0; L]
        static constexpr bool row_major = true;
        Matrix<T, T, true> L;
        int d;
        SSVDO_HD T operator()(int i, int j) const { return i < d ? T(0) : L(i - d, j); }
    };

    template <class Team>
    SSVDO_HD void operator()(const Team& team, int tile, int layer, T* shared) const {
        const auto& g = this->g;
        const Place at = place<Shape>(tile, g.large, this->across());
        Sums<Shape, Team> sums;
        sums.clear();
        sums.add(team, shared, at.m0, at.n0, g.r, matrix<T>(this->template Y<S>(layer), g.large, g.r, g.r),
                 matrix<T>(g.right + layer * this->tall(), g.r, g.l, g.l));
        if (g.rotation)
            sums.add(team, shared, at.m0, at.n0, g.l, matrix<T>(this->template U<S>(layer), g.large, g.l, g.l),
                     Turned{g.inverse[layer], g.l, g.root_tau});
        if (at.m0 + Shape::M > this->d())
            sums.add(team, shared, at.m0, at.n0, g.l, Lowered{this->L(layer), this->d()}, this->X(layer));
        T* to = g.columns[layer];
        const int large = g.large, l = g.l, ld = g.ld;
        store_inside(sums, team, at, large, l, [&](int m, int n, T sum) { to[ptrdiff_t(m) * ld + n] = sum; });
    }
};

template <class T, class S>
struct ProjectKernel : OuterKernel<T> {  // right = Y^T dF; gram = L^T dF_bot + sqrt(tau) U^T dF
    using typename OuterKernel<T>::Shape;
    int count() const { return (this->down(this->g.r) + this->down(this->g.l)) * this->across(); }
    template <class Team>
    SSVDO_HD void operator()(const Team& team, int tile, int layer, T* shared) const {
        const auto& g = this->g;
        const Place at = place<Shape>(tile, g.r, this->across());
        const auto dF = matrix<T>(static_cast<const T*>(g.columns[layer]), g.large, g.l, g.ld);
        Sums<Shape, Team> sums;
        sums.clear();
        if (at.first) {
            sums.add(team, shared, at.m0, at.n0, g.large, transposed<T>(this->template Y<S>(layer), g.r, g.large, g.r), dF);
        } else {
            sums.add(team, shared, at.m0, at.n0, g.c, this->L_transposed(layer),
                     matrix<T>(this->dF_bottom(layer), g.c, g.l, g.ld));
            if (g.rotation)
                sums.add(team, shared, at.m0, at.n0, g.large,
                         transposed<T>(this->template U<S>(layer), g.l, g.large, g.l, g.root_tau), dF);
        }
        T* to = at.first ? g.right + layer * this->tall() : g.gram + layer * this->square();
        const int rows = at.first ? g.r : g.l, l = g.l;
        store_inside(sums, team, at, rows, l, [&](int m, int n, T sum) { to[ptrdiff_t(m) * l + n] = sum; });
    }
};

template <class T, class S>
struct PullKernel : OuterKernel<T> {  // dQ = dF_bot - Y_bot right; dX = gram - left^T right, in gram's place
    using typename OuterKernel<T>::Shape;
    int count() const { return (this->down(this->g.c) + this->down(this->g.l)) * this->across(); }
    template <class Team>
    SSVDO_HD void operator()(const Team& team, int tile, int layer, T* shared) const {
        const auto& g = this->g;
        const Place at = place<Shape>(tile, g.c, this->across());
        const auto right = matrix<T>(static_cast<const T*>(g.right + layer * this->tall()), g.r, g.l, g.l);
        Sums<Shape, Team> sums;
        sums.clear();
        const int l = g.l;
        if (at.first) {
            sums.add(team, shared, at.m0, at.n0, g.r, matrix<T>(this->template Y_bottom<S>(layer), g.c, g.r, g.r), right);
            T* to = g.pull + layer * ptrdiff_t(g.c) * l;
            const T* from = this->dF_bottom(layer);
            const int c = g.c, ld = g.ld;
            store_inside(sums, team, at, c, l, [&](int m, int n, T sum) {
                to[ptrdiff_t(m) * l + n] = from[ptrdiff_t(m) * ld + n] - sum;
            });
        } else {
            const T* left = g.left[layer];
            sums.add(team, shared, at.m0, at.n0, g.r, transposed<T>(left, l, g.r, l), right);
            T* to = g.gram + layer * this->square();
            store_inside(sums, team, at, l, l, [&](int m, int n, T sum) { to[ptrdiff_t(m) * l + n] -= sum; });
        }
    }
};

template <class T>
struct AdjointKernel : OuterKernel<T> {  // more = S, from gram = dX; one team a layer
    using Shape = Square<T>;
    static constexpr int min_blocks = 1;
    int shared() const { return Shape::shared; }
    int count() const { return 1; }

    template <class Team, class A, class B, class Each>
    SSVDO_HD void product(const Team& team, T* shared, const A& a, const B& b, Each each) const {
        const int l = this->g.l;
        for (int m0 = 0; m0 < l; m0 += Shape::M)
            for (int n0 = 0; n0 < l; n0 += Shape::N) {
                Sums<Shape, Team> sums;
                sums.clear();
                sums.add(team, shared, m0, n0, l, a, b);
                store_inside(sums, team, Place{true, m0, n0}, l, l, each);
            }
        team.sync();
    }

    template <class Team>
    SSVDO_HD void operator()(const Team& team, int, int layer, T* shared) const {
        const int l = this->g.l;
        T* P = this->g.gram + layer * this->square();
        T* other = this->g.more + layer * this->square();
        const auto X = this->X(layer);
        product(team, shared, transposed<T>(static_cast<const T*>(P), l, l, l), X, [&](int m, int n, T sum) {
            other[ptrdiff_t(m) * l + n] = n > m ? T(0) : n == m ? -sum / 2 : -sum;
        });
        product(team, shared, X, matrix<T>(static_cast<const T*>(other), l, l, l),
                [&](int m, int n, T sum) { P[ptrdiff_t(m) * l + n] = sum; });
        product(team, shared, matrix<T>(static_cast<const T*>(P), l, l, l), this->X_transposed(layer),
                [&](int m, int n, T sum) { other[ptrdiff_t(m) * l + n] = sum; });
        for (int e = team.rank; e < l * l; e += team.size) {
            const int i = e / l, j = e % l;
            if (i > j) continue;
            const T sum = other[ptrdiff_t(i) * l + j] + other[ptrdiff_t(j) * l + i];
            other[ptrdiff_t(i) * l + j] = other[ptrdiff_t(j) * l + i] = sum;
        }
    }
};

template <class T>
struct GradientKernel : OuterKernel<T> {  // d outer = scale (dQ X^T + L S)
    using typename OuterKernel<T>::Shape;
    int count() const { return this->down(this->g.c) * this->across(); }
    template <class Team>
    SSVDO_HD void operator()(const Team& team, int tile, int layer, T* shared) const {
        const auto& g = this->g;
        const Place at = place<Shape>(tile, g.c, this->across());
        const int c = g.c, l = g.l;
        Sums<Shape, Team> sums;
        sums.clear();
        sums.add(team, shared, at.m0, at.n0, l,
                 matrix<T>(static_cast<const T*>(g.pull + layer * ptrdiff_t(c) * l), c, l, l), this->X_transposed(layer));
        sums.add(team, shared, at.m0, at.n0, l, this->L(layer),
                 matrix<T>(static_cast<const T*>(g.more + layer * this->square()), l, l, l));
        T* to = g.d_outer[layer];
        const T scale = g.scale;
        store_inside(sums, team, at, c, l, [&](int m, int n, T sum) { to[ptrdiff_t(m) * l + n] = scale * sum; });
    }
};

}  // namespace SSVDO_ISA
}  // namespace ssvdo
