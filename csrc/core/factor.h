// Cholesky factor, its transposed inverse and the adjoint of both, for one matrix of l x l by a team.
//
//     R R^T = Gram (lower)     X = R^-T (upper)     Q = L X,  C = sqrt(tau) X
//
// Adjoint: with dX given, Phi = -tril(dX^T X) with its diagonal halved, dGram = X Phi X^T, and what L receives is
// L (dGram + dGram^T): the standard adjoint (Murray, "Differentiation of the Cholesky decomposition", 2016) with R^-1
// at hand. Row-major.
#pragma once

#include "team.h"

namespace ssvdo {
namespace SSVDO_ISA {

// a . b, in eight partial sums.
template <class T>
SSVDO_HD T dot(const T* a, const T* b, int count) {
    T sums[8] = {};
    int i = 0;
    for (; i + 8 <= count; i += 8)
        for (int s = 0; s < 8; s++) sums[s] += a[i + s] * b[i + s];
    for (; i < count; i++) sums[0] += a[i] * b[i];
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// Overwrites the lower triangle of A by R. Returns 0, or 1 + the column whose pivot is not positive and finite.
template <class Team, class T>
SSVDO_HD int cholesky(const Team& team, T* A, int l, ptrdiff_t ld) {
    for (int j = 0; j < l; j++) {
        for (int i = j + team.rank; i < l; i += team.size) A[i * ld + j] -= dot(A + i * ld, A + j * ld, j);
        team.sync();
        T pivot = A[j * ld + j];
        team.sync();
        if (!(pivot > T(0) && pivot - pivot == T(0))) return j + 1;
        T diagonal = root(pivot);
        for (int i = j + team.rank; i < l; i += team.size) A[i * ld + j] = i == j ? diagonal : A[i * ld + j] / diagonal;
        team.sync();
    }
    return 0;
}

// X = R^-T (l x l, leading dimension l) from the lower triangle of R; zeros below its diagonal.
template <class Team, class T>
SSVDO_HD void inverse_transposed(const Team& team, const T* R, ptrdiff_t ld, T* X, int l) {
    for (int j = team.rank; j < l; j += team.size) {  // row j of X is column j of R^-1
        T* y = X + ptrdiff_t(j) * l;
        for (int i = 0; i < j; i++) y[i] = 0;
        for (int i = j; i < l; i++) {
            const T* r = R + i * ld;
            y[i] = ((i == j ? T(1) : T(0)) - dot(r + j, y + j, i - j)) / r[i];
        }
    }
    team.sync();
}

// S = dGram + dGram^T from dX and X; P and S are l x l, P is scratch.
template <class Team, class T>
SSVDO_HD void gram_gradient(const Team& team, const T* dX, const T* X, T* P, T* S, int l) {
    for (int i = team.rank; i < l; i += team.size)  // P = Phi
        for (int j = 0; j < l; j++) {
            T sum = 0;
            if (j <= i)
                for (int k = 0; k <= j; k++) sum -= dX[ptrdiff_t(k) * l + i] * X[ptrdiff_t(k) * l + j];
            P[ptrdiff_t(i) * l + j] = i == j ? sum / 2 : sum;
        }
    team.sync();
    for (int i = team.rank; i < l; i += team.size)  // S = X Phi; rows of X begin at their diagonal
        for (int j = 0; j < l; j++) {
            T sum = 0;
            for (int k = i > j ? i : j; k < l; k++) sum += X[ptrdiff_t(i) * l + k] * P[ptrdiff_t(k) * l + j];
            S[ptrdiff_t(i) * l + j] = sum;
        }
    team.sync();
    for (int i = team.rank; i < l; i += team.size)  // P = (X Phi) X^T = dGram
        for (int j = 0; j < l; j++) {
            T sum = 0;
            for (int k = j; k < l; k++) sum += S[ptrdiff_t(i) * l + k] * X[ptrdiff_t(j) * l + k];
            P[ptrdiff_t(i) * l + j] = sum;
        }
    team.sync();
    for (int i = team.rank; i < l; i += team.size)
        for (int j = 0; j < l; j++) S[ptrdiff_t(i) * l + j] = P[ptrdiff_t(i) * l + j] + P[ptrdiff_t(j) * l + i];
    team.sync();
}

}  // namespace SSVDO_ISA
}  // namespace ssvdo
