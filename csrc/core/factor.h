// R R^T = Gram (R lower triangular) and R^-1, for one matrix of l x l by a team. Row-major.
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

// R^-1 (l x l) from the lower triangle of R, zeros above its diagonal. A worker solves for whole columns.
template <class Team, class T>
SSVDO_HD void inverse_lower(const Team& team, const T* R, ptrdiff_t ld, T* inverse, int l) {
    for (int j = team.rank; j < l; j += team.size) {
        T* y = inverse + j;
        for (int i = 0; i < j; i++) y[ptrdiff_t(i) * l] = 0;
        for (int i = j; i < l; i++) {
            const T* r = R + i * ld;
            T sum = i == j ? T(1) : T(0);
            for (int k = j; k < i; k++) sum -= r[k] * y[ptrdiff_t(k) * l];
            y[ptrdiff_t(i) * l] = sum / r[i];
        }
    }
    team.sync();
}

}  // namespace SSVDO_ISA
}  // namespace ssvdo
