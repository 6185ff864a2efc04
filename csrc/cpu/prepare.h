// The inner part's preparation for a batch of layers on a CPU; the algebra is that of ssvdo_kernels/ops/preparation.py and
// rotation.py.
#pragma once

#include "../core/skew.h"
#include "api.h"
#include "gemm.h"

namespace ssvdo {
namespace SSVDO_ISA {

// Layers side by side where there are as many as threads, else one after the other, each by all threads.
template <class Layer, class Work>
inline void each(Layer* layers, int count, int threads, Work work) {
    if (count >= threads && threads > 1)
        parallel_for(count, threads, [&](int i) { work(layers[i], 1); });
    else
        for (int i = 0; i < count; i++) work(layers[i], threads);
}

// A^-1 by Gauss-Jordan without pivots, for a leading part of I + K: its symmetric part is I, and so are at least those of
// all its Schur complements.
template <class T>
inline void gauss_jordan(View<T> A, int n) {
    for (int p = 0; p < n; p++) {
        T inverse = T(1) / A(p, p);
        T* pivot = &A(p, 0);
        pivot[p] = T(1);
        for (int j = 0; j < n; j++) pivot[j] *= inverse;
        for (int i = 0; i < n; i++) {
            if (i == p) continue;
            T* row = &A(i, 0);
            T factor = row[p];
            row[p] = T(0);
            for (int j = 0; j < n; j++) row[j] -= factor * pivot[j];
        }
    }
}

// A^-1 in place, by 2 x 2 blocks and the Schur complement of the first; scratch: n * n / 2 elements.
template <class T>
inline void inverse(View<T> A, int n, T* scratch, int threads) {
    if (n <= 64) return gauss_jordan(A, n);
    const int h = n / 2, g = n - h;
    View<T> first = A, upper = A.at(0, h), lower = A.at(h, 0), last = A.at(h, h);
    View<T> left{scratch, h, 1};  // g x h
    T* rest = scratch + ptrdiff_t(g) * h;
    inverse(first, h, rest, threads);
    gemm<T>(g, h, h, T(1), lower, first, false, left, threads);
    gemm<T>(g, g, h, T(-1), left, upper, true, last, threads);
    inverse(last, g, rest, threads);
    View<T> right{rest, g, 1};  // h x g
    gemm<T>(h, g, h, T(1), first, upper, false, right, threads);
    gemm<T>(h, g, g, T(-1), right, last, false, upper, threads);
    gemm<T>(h, h, g, T(-1), upper, left, true, first, threads);
    gemm<T>(g, h, g, T(-1), last, left, false, lower, threads);
}

template <class T>
inline void unpack(const T* packed, int k, T diagonal, T* out) {
    for (int i = 0; i < k; i++) {
        out[ptrdiff_t(i) * k + i] = diagonal;
        const ptrdiff_t row = packed_row(i, k);
        for (int j = i + 1; j < k; j++) out[ptrdiff_t(i) * k + j] = packed[row + j];
    }
    constexpr int B = 16;  // the lower triangle in tiles that a cache holds
    for (int i = 0; i < k; i += B)
        for (int j = 0; j <= i; j += B)
            for (int a = i; a < i + B && a < k; a++)
                for (int b = j; b < j + B && b < a; b++) out[ptrdiff_t(a) * k + b] = -out[ptrdiff_t(b) * k + a];
}

// upper(Z - Z^T), packed
template <class T>
inline void pack(const T* Z, int k, T* packed) {
    constexpr int B = 16;
    for (int i = 0; i < k; i += B)
        for (int j = i; j < k; j += B)
            for (int a = i; a < i + B && a < k; a++) {
                const ptrdiff_t row = packed_row(a, k);
                for (int b = j > a ? j : a + 1; b < j + B && b < k; b++)
                    packed[row + b] = Z[ptrdiff_t(a) * k + b] - Z[ptrdiff_t(b) * k + a];
            }
}

// T_terms of T_j = -K (I + T_{j-1}), T_0 = 0, into `out`; scratch: k * k.
template <class T>
inline void horner(View<const T> K, int k, int terms, T* out, T* scratch, int threads) {
    const ptrdiff_t count = ptrdiff_t(k) * k;
    for (ptrdiff_t i = 0; i < count; i++) out[i] = 0;
    for (int term = 0; term < terms; term++) {
        for (ptrdiff_t i = 0; i < count; i++) scratch[i] = -K.data[i];
        gemm<T>(k, k, k, T(-1), K, View<const T>{out, k, 1}, true, View<T>{scratch, k, 1}, threads);
        for (ptrdiff_t i = 0; i < count; i++) out[i] = scratch[i];
    }
}

template <class T>
inline void inner_forward_one(const InnerShape& s, InnerLayer<T>& layer, int threads) {
    const int k = s.k;
    const ptrdiff_t count = ptrdiff_t(k) * k;
    unpack(layer.packed, k, s.rotation == Rotation::cayley ? T(1) : T(0), layer.saved);
    T factor = T(2), diagonal = T(1);
    const T* from = layer.saved;
    Scratch<T> series(s.rotation == Rotation::neumann ? count : 1), scratch(count + 64);
    if (s.rotation == Rotation::cayley) {
        inverse(View<T>{layer.saved, k, 1}, k, scratch.data, threads);
        diagonal = T(-1);
    } else if (s.rotation == Rotation::neumann) {
        horner(View<const T>{layer.saved, k, 1}, k, s.terms, series.data, scratch.data, threads);
        from = series.data;
    } else {
        factor = T(-2);
    }
    for (ptrdiff_t i = 0; i < count; i++) layer.G[i] = factor * from[i];
    for (int i = 0; i < k; i++) layer.G[ptrdiff_t(i) * k + i] += diagonal;
    const MixerShape shape{k, s.l, s.q, s.width};
    for (int row = 0; row < shape.rows(); row++) {
        const MixerRow<T> m = mixer_row(shape, layer.singular, layer.shift, row);
        T* to = layer.mixer + ptrdiff_t(row) * s.width;
        int filled = m.source < 0 ? 0 : k;
        for (int j = 0; j < filled; j++) to[j] = m.factor * layer.G[ptrdiff_t(m.source) * k + j];
        for (int j = filled; j < s.width; j++) to[j] = 0;
        to[m.at] += m.value;
    }
}

// Z = d of K's entries from dG (k x k, overwritten); scratch: k * k.
template <class T>
inline void rotation_backward(const InnerShape& s, const T* saved, T* dG, T* Z, T* scratch, int threads) {
    const int k = s.k;
    const ptrdiff_t count = ptrdiff_t(k) * k;
    const View<const T> K{saved, k, 1};
    const View<T> dg{dG, k, 1}, z{Z, k, 1}, other{scratch, k, 1};
    if (s.rotation == Rotation::cayley) {
        gemm<T>(k, k, k, T(1), dg, K.transposed(), false, other, threads);
        gemm<T>(k, k, k, T(-2), K.transposed(), other, false, z, threads);
    } else if (s.rotation == Rotation::first_order) {
        for (ptrdiff_t i = 0; i < count; i++) Z[i] = T(-2) * dG[i];
    } else {
        Scratch<T> previous(count), more(count);
        for (ptrdiff_t i = 0; i < count; i++) dG[i] *= 2, Z[i] = 0;
        for (int j = s.terms; j > 0; j--) {
            horner(K, k, j - 1, previous.data, scratch, threads);
            for (ptrdiff_t i = 0; i < count; i++) Z[i] -= dG[i];
            gemm<T>(k, k, k, T(-1), dg, View<const T>{previous.data, 1, k}, true, z, threads);
            gemm<T>(k, k, k, T(1), K, dg, false, View<T>{more.data, k, 1}, threads);  // -K^T = K
            for (ptrdiff_t i = 0; i < count; i++) dG[i] = more.data[i];
        }
    }
}

template <class T>
inline void inner_backward_one(const InnerShape& s, InnerLayer<T>& layer, int threads) {
    const int k = s.k;
    const MixerShape shape{k, s.l, s.q, s.width};
    Scratch<T> Z(size_t(k) * k);
    if (layer.tokens >= 0) {  // dB = g^T h of few rows, Cayley: Z = -2 (g diag(scale) M)^T (h M^T)
        const int t = layer.tokens;
        Scratch<T> g(size_t(t) * k), gM(size_t(t) * k), hM(size_t(t) * k);
        const View<const T> M{layer.saved, k, 1}, h{layer.right, layer.right_ld, 1};
        const View<T> hm{hM.data, k, 1}, gm{gM.data, k, 1};
        gemm<T>(t, k, k, T(1), h, M.transposed(), false, hm, threads);
        for (int i = 0; i < k; i++) layer.d_scale[i] = 0;
        for (int row = 0; row < t; row++)
            for (int i = 0; i < k; i++) {
                T value = inner_gradient(shape, layer.left + row * layer.left_ld, 1, layer.singular, i);
                layer.d_scale[i] += value * (2 * hm(row, i) - h(row, i));  // h G^T = 2 h M^T - h
                g.data[ptrdiff_t(row) * k + i] = value * (layer.singular[i] + layer.shift[i]);
            }
        gemm<T>(t, k, k, T(1), View<const T>{g.data, k, 1}, M, false, gm, threads);
        gemm<T>(k, k, t, T(-2), View<const T>(gm).transposed(), hm, false, View<T>{Z.data, k, 1}, threads);
        return pack(Z.data, k, layer.d_packed);
    }
    Scratch<T> dG(size_t(k) * k), scratch(size_t(k) * k);
    for (int i = 0; i < k; i++) {
        T sum = 0;
        for (int j = 0; j < k; j++) {
            T value = inner_gradient(shape, layer.mixer + j, s.width, layer.singular, i);
            sum += value * layer.G[ptrdiff_t(i) * k + j];
            dG.data[ptrdiff_t(i) * k + j] = value * (layer.singular[i] + layer.shift[i]);
        }
        layer.d_scale[i] = sum;
    }
    rotation_backward(s, layer.saved, dG.data, Z.data, scratch.data, threads);
    pack(Z.data, k, layer.d_packed);
}

// A large matrix by a few columns. One with adjacent rows is read as the packed operand of out^T = b^T a^T.
template <class T>
inline void product_one(const ProductShape& s, const ProductLayer<T>& one, int threads) {
    const View<const T> a{one.a, s.a_row, s.a_column}, b{one.b, s.b_row, s.b_column};
    const View<T> out{one.out, s.out_row, s.out_column};
    if (s.out_column == 1)
        gemm<T>(s.rows, s.columns, s.inner, T(1), a, b, false, out, threads);
    else
        gemm<T>(s.columns, s.rows, s.inner, T(1), b.transposed(), a.transposed(), false, out.transposed(), threads);
}

// -- what the bindings call ------------------------------------------------------------------------------------------
template <class T>
struct Build {
    static void product(const ProductShape& s, ProductLayer<T>* layers, int count, int threads) {
        each(layers, count, threads, [&](ProductLayer<T>& one, int t) { product_one(s, one, t); });
    }
    static void inner_forward(const InnerShape& s, InnerLayer<T>* layers, int count, int threads) {
        each(layers, count, threads, [&](InnerLayer<T>& one, int t) { inner_forward_one(s, one, t); });
    }
    static void inner_backward(const InnerShape& s, InnerLayer<T>* layers, int count, int threads) {
        each(layers, count, threads, [&](InnerLayer<T>& one, int t) { inner_backward_one(s, one, t); });
    }
    static const Host<T>* table() {
        static const Host<T> found{product, inner_forward, inner_backward};
        return &found;
    }
};

const Host<float>* single() { return Build<float>::table(); }
const Host<double>* twice() { return Build<double>::table(); }

}  // namespace SSVDO_ISA
}  // namespace ssvdo
