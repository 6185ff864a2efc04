// The outer part as plans of products: the algebra of ssvdo_kernels/ops/outer.py and complement.py. Who computes them:
// outer.h.
#pragma once

#include "api.h"

namespace ssvdo {
namespace SSVDO_ISA {

// A frozen matrix, or one of the work, from element `at` on, as A's lines: see Matrix.
struct Left {
    const void* data;
    Stored type;
    unsigned ld;
    ptrdiff_t at;
    bool along;
};

// A (B factor), of depth `depth`; B by rows, or by columns (along). coarse: to 2^-16 of B will do.
template <class T>
struct Term {
    int depth;
    Left left;
    const T* right;
    unsigned ld;
    bool along;
    T factor;
    bool coarse;
};

// out (rows x columns) = alpha sum of terms + beta addend, and row i of that times 1 / S_i^2 where it is `divided`. The
// addend has no rows before `from`.
template <class T>
struct Product {
    static constexpr int most = 3;
    int rows, columns, count;
    Term<T> terms[most];
    T* out;
    unsigned ld;
    T alpha, beta;
    const T* addend;
    unsigned addend_ld;
    int from;
    bool divided;

    SSVDO_HD void begin(int height, int width, T* to, unsigned to_ld, T times = T(1)) {
        rows = height, columns = width, count = 0, out = to, ld = to_ld, alpha = times, addend = nullptr, divided = false;
    }
    SSVDO_HD void term(int depth, const Left& left, const T* right, unsigned right_ld, T factor = T(1), bool along = false,
                       bool coarse = false) {
        terms[count++] = {depth, left, right, right_ld, along, factor, coarse};
    }
    SSVDO_HD void add(const T* matrix, T times, unsigned matrix_ld, int first) {
        addend = matrix, beta = times, addend_ld = matrix_ld, from = first;
    }
};

// Where a layer's matrices lie, and the products that its plans are made of.
template <class T>
struct OuterLayer {
    const OuterGroup<T>& g;
    const int& layer;

    SSVDO_HD OuterLayer(const OuterGroup<T>& g, const int& layer) : g(g), layer(layer) {}

    // Scratch.
    SSVDO_HD T* Z() const { return g.work + layer * (outer_work(g) + g.room); }  // large x l
    SSVDO_HD T* small() const { return Z() + ptrdiff_t(g.large) * g.l; }         // d x l
    SSVDO_HD T* other() const { return small() + ptrdiff_t(g.d) * g.l; }         // d x l
    SSVDO_HD T* null() const { return other() + ptrdiff_t(g.d) * g.l; }          // g.null x l
    SSVDO_HD T* squares() const { return null() + ptrdiff_t(g.null) * g.l; }     // l x l, three
    SSVDO_HD T* partial() const { return squares() + 3 * ptrdiff_t(g.l) * g.l; }

    // 1 / S_i where that is of use, else 0: `inverse_of` in complement.py.
    SSVDO_HD T inverse(int i) const {
        const T* S = g.singular[layer];
        const T tiny = sizeof(T) == 4 ? T(1.17549435e-38) : T(2.2250738585072014e-308), least = S[0] * g.least;
        const bool useful = i < g.width ? i < g.width - g.null : S[i] > (least > tiny ? least : tiny);
        return useful ? 1 / S[i] : T(0);
    }
    // 1 / S_0 (1 where W0 = 0): keeps what is of W0's size in the range of float32.
    SSVDO_HD T unit() const {
        const T first = inverse(0);
        return first > T(0) ? first : T(1);
    }

    // A's rows from `row` on, or their transpose.
    SSVDO_HD Left tall(int row, bool transposed) const {
        return {g.tall[layer], g.tall_type, g.tall_ld, g.by_rows ? ptrdiff_t(row) * g.tall_ld : row, g.by_rows != transposed};
    }
    SSVDO_HD Left basis(bool transposed) const { return {g.basis[layer], g.basis_type, g.basis_ld, 0, !transposed}; }
    SSVDO_HD Left turned(int row, bool transposed) const {
        return {g.turned[layer], g.rest_type, unsigned(g.l), row * ptrdiff_t(g.l), !transposed};
    }
    SSVDO_HD Left rest(int row, bool transposed) const {
        return {g.rest[layer], g.rest_type, unsigned(g.null), row * ptrdiff_t(g.null), !transposed};
    }
    SSVDO_HD static Left own(const T* data, unsigned ld, bool transposed) {
        return {data, Stored::work, ld, 0, !transposed};
    }
    SSVDO_HD T* last(T* data, int rows, unsigned ld) const { return data + unsigned(g.large - rows) * ld; }

    // Product `step` of projection(): P (z factor), its last `rows` into the last rows of Z; z: the last `first` rows, those
    // above are 0. A^T z, N^T z (left out where there is no N), V^T, V, z - A - N. All of a first pass may be coarse, as the
    // second makes it good; of the second all but A^T z and N^T z, as they see what the first left, 2^-8 of z.
    SSVDO_HD int projection() const { return g.passes * (g.null ? 5 : 4); }
    SSVDO_HD void project(Product<T>& p, int step, const T* z, unsigned ld, int first, T factor, int rows) const {
        const int turn = step / (g.null ? 5 : 4), count = turn + 1 == g.passes ? rows : g.large;
        const unsigned l = g.l;
        if (turn > 0) z = Z(), ld = l, first = g.large, factor = T(1);
        step %= g.null ? 5 : 4;
        if (step > 0 && !g.null) step++;
        const bool coarse = turn + 1 < g.passes || (turn > 0 && step > 1);
        const auto term = [&](int depth, const Left& left, const T* right, unsigned right_ld, T times = T(1)) {
            p.term(depth, left, right, right_ld, times, false, coarse);
        };
        if (step == 0) {
            p.begin(g.d, l, small(), l);
            term(first, tall(g.large - first, true), z, ld, factor);
        } else if (step == 1) {
            p.begin(g.null, l, null(), l);
            term(first, rest(g.large - first, true), z, ld, factor);
        } else if (step == 2) {
            p.begin(g.d, l, other(), l);
            term(g.d, basis(true), small(), l);
            p.divided = true;
        } else if (step == 3) {
            p.begin(g.d, l, small(), l);
            term(g.d, basis(false), other(), l);
        } else {
            const int both = first < count ? first : count;
            p.begin(count, l, last(Z(), count, l), l, T(-1));
            term(g.d, tall(g.large - count, false), small(), l);
            if (g.null) term(g.null, rest(g.large - count, false), null(), l);
            p.add(z + unsigned(first - both) * ld, factor, ld, count - both);
        }
    }
};

template <class T>
struct OuterForward : OuterLayer<T> {
    using OuterLayer<T>::OuterLayer;
    using OuterLayer<T>::g;

    SSVDO_HD int factored() const { return this->projection() + 1; }
    SSVDO_HD T* gram() const { return this->squares(); }
    SSVDO_HD T* change() const { return gram() + g.l * g.l; }  // sqrt(tau) X - I
    // Z^T Z; F = Z X + U (sqrt(tau) X - I), without U where there is none.
    SSVDO_HD int steps() const { return this->projection() + 2; }
    SSVDO_HD void step(Product<T>& p, int i) const {
        const int layer = this->layer, l = g.l;
        if (i < this->projection()) return this->project(p, i, g.outer[layer], l, g.c, g.scale, g.large);
        if (i == this->projection()) {
            p.begin(l, l, gram(), l);
            return p.term(g.large, this->own(this->Z(), l, true), this->Z(), l);
        }
        p.begin(g.large, l, g.F[layer], g.F_ld);
        p.term(l, this->own(this->Z(), l, false), g.X[layer], l);
        if (g.turned[layer]) p.term(l, this->turned(0, false), change(), l);
    }
    template <class Work>
    SSVDO_HD bool before(int, Work&) const { return false; }
};

template <class T>
struct OuterBackward : OuterLayer<T> {
    using OuterLayer<T>::OuterLayer;
    using OuterLayer<T>::g;

    SSVDO_HD T* dX() const { return this->squares(); }  // and, when that has been used, H
    SSVDO_HD T* lower() const { return dX() + g.l * g.l; }  // of dX^T X; then H X^T
    SSVDO_HD T* change() const { return lower() + g.l * g.l; }
    // dX = L^T E + sqrt(tau) U^T dF; dX^T X; H X^T; (sqrt(tau) X - I) H X^T, left out where there is no U;
    // dL = E X^T + F H X^T - U (sqrt(tau) X - I) H X^T.
    SSVDO_HD int steps() const { return this->projection() + (g.turned[this->layer] ? 5 : 4); }
    SSVDO_HD int factored() const { return steps(); }
    SSVDO_HD void step(Product<T>& p, int i) const {
        const int layer = this->layer, l = g.l;
        const bool turned = g.turned[layer];
        const T unit = this->unit();
        const T *E = this->last(this->Z(), g.c, l), *X = g.X[layer];
        if (i < this->projection()) return this->project(p, i, g.dF[layer], g.dF_ld, g.large, unit, g.c);
        i -= this->projection();
        if (i == 0) {
            p.begin(l, l, dX(), l);
            p.term(g.c, this->own(g.outer[layer], l, true), E, l, g.scale);
            if (turned) p.term(g.large, this->turned(0, true), g.dF[layer], g.dF_ld, root(g.tau) * unit);
        } else if (i == 1) {
            p.begin(l, l, lower(), l);
            p.term(l, this->own(dX(), l, true), X, l);
        } else if (i == 2) {
            p.begin(l, l, lower(), l);
            p.term(l, this->own(dX(), l, false), X, l, T(1), true);
        } else if (i == 3 && turned) {
            p.begin(l, l, this->small(), l);
            p.term(l, this->own(change(), l, false), lower(), l);
        } else {
            p.begin(g.c, l, g.d_outer[layer], l, g.scale / unit);
            p.term(l, this->own(E, l, false), X, l, T(1), true);
            p.term(l, this->own(this->last(g.F[layer], g.c, g.F_ld), g.F_ld, false), lower(), l);
            if (turned) p.term(l, this->turned(g.large - g.c, false), this->small(), l, T(-1));
        }
    }
    // What is no product, before step i; whether there is any.
    template <class Work>
    SSVDO_HD bool before(int i, Work& work) const {
        if (i != this->projection() + 2) return false;
        const T *X = g.X[this->layer], least = root(g.tau);
        const int l = g.l;
        work.elements(ptrdiff_t(l) * l, [&](ptrdiff_t e) {
            const ptrdiff_t i = e / l, j = e % l;
            dX()[e] = -lower()[i > j ? e : j * l + i];  // H
            change()[e] = least * X[e] - (i == j ? T(1) : T(0));
        });
        return true;
    }
};

}  // namespace SSVDO_ISA
}  // namespace ssvdo
