// One M x N tile of a product by a team of 256 lanes: operands pass through shared memory in slices of `K`, two deep,
// and each lane keeps TM x TN sums. A team smaller than that, on the host, plays several lanes a worker.
#pragma once

#include <type_traits>

#include "number.h"

namespace ssvdo {
namespace SSVDO_ISA {

template <class T, int M_, int N_, int TM_, int TN_>
struct TileShape {
    using Number = T;
    static constexpr int M = M_, N = N_, TM = TM_, TN = TN_, K = 8;
    static constexpr int lanes = M / TM * (N / TN);
    static constexpr int pad = 16 / int(sizeof(T));      // rows in shared memory begin at multiples of 16 bytes
    static constexpr int stage = K * (M + N + 2 * pad);  // one slice of both operands
    static constexpr int shared = 2 * stage;             // elements of shared memory
};
template <class T>
using Square = TileShape<T, 64, 64, 4, 4>;
template <class T>  // what 128 registers a lane hold
using Large = typename std::conditional<sizeof(T) == 4, TileShape<T, 128, 64, 8, 4>, Square<T>>::type;

// Element (i, j) inside of rows x columns, else 0. RowMajor: at data[i * ld + j], else at data[j * ld + i].
template <class T, class S, bool RowMajor>
struct Matrix {
    static constexpr bool row_major = RowMajor;  // lanes next to each other then read along j
    const S* data;
    int rows, columns;
    ptrdiff_t ld;
    SSVDO_HD T operator()(int i, int j) const {
        if (i >= rows || j >= columns) return T(0);
        return T(value(RowMajor ? data[i * ld + j] : data[j * ld + i]));
    }
};
template <class T, class S>
SSVDO_HD Matrix<T, S, true> matrix(const S* data, int rows, int columns, ptrdiff_t ld) {
    return {data, rows, columns, ld};
}
template <class T, class S>
SSVDO_HD Matrix<T, S, false> transposed(const S* data, int rows, int columns, ptrdiff_t ld) {
    return {data, rows, columns, ld};
}

template <class Shape, class Team>
struct Sums {
    using T = typename Shape::Number;
    static constexpr int part = Shape::lanes / Team::size;
    T sum[part][Shape::TM * Shape::TN];

    SSVDO_HD void clear() {
        for (int p = 0; p < part; p++)
            for (int i = 0; i < Shape::TM * Shape::TN; i++) sum[p][i] = T(0);
    }

    // sum += A(m0 + ., :) B(:, n0 + .) over `depth`. A(i, k), B(k, j): functors that give 0 outside of the matrix, k >= depth
    // included.
    template <class A, class B>
    SSVDO_HD void add(const Team& team, T* shared, int m0, int n0, int depth, const A& a, const B& b) {
        constexpr unsigned M = Shape::M, N = Shape::N, K = Shape::K;
        constexpr int na = M * K / Shape::lanes, nb = N * K / Shape::lanes;
        constexpr int lda = M + Shape::pad, ldb = N + Shape::pad;
        T next_a[part][na], next_b[part][nb];
        auto fetch = [&](int k0) {
            for (int p = 0; p < part; p++) {
                const unsigned lane = team.rank + p * Team::size;
SSVDO_UNROLL
                for (int i = 0; i < na; i++) {
                    const unsigned e = lane + i * Shape::lanes, m = A::row_major ? e / K : e % M;
                    const unsigned k = A::row_major ? e % K : e / M;
                    next_a[p][i] = a(int(m0 + m), int(k0 + k));
                }
SSVDO_UNROLL
                for (int i = 0; i < nb; i++) {
                    const unsigned e = lane + i * Shape::lanes, n = B::row_major ? e % N : e / K;
                    const unsigned k = B::row_major ? e / N : e % K;
                    next_b[p][i] = b(int(k0 + k), int(n0 + n));
                }
            }
        };
        auto put = [&](T* to) {
            for (int p = 0; p < part; p++) {
                const unsigned lane = team.rank + p * Team::size;
SSVDO_UNROLL
                for (int i = 0; i < na; i++) {
                    const unsigned e = lane + i * Shape::lanes, m = A::row_major ? e / K : e % M;
                    to[(A::row_major ? e % K : e / M) * lda + m] = next_a[p][i];
                }
SSVDO_UNROLL
                for (int i = 0; i < nb; i++) {
                    const unsigned e = lane + i * Shape::lanes, n = B::row_major ? e % N : e / K;
                    to[K * lda + (B::row_major ? e / N : e % K) * ldb + n] = next_b[p][i];
                }
            }
        };
        if (depth <= 0) return;
        fetch(0);
        put(shared);  // which nobody reads any more: the last slice of an earlier `add` ended with a barrier
        team.sync();
        const int slices = (depth + K - 1) / K;
        for (int slice = 0; slice < slices; slice++) {
            const bool more = slice + 1 < slices;
            if (more) fetch((slice + 1) * K);
            multiply(team, shared + (slice & 1) * Shape::stage);
            if (more) put(shared + (~slice & 1) * Shape::stage);
            team.sync();
        }
    }

    // each(m, n, sum) for this worker's elements, m and n counted from the tile's corner.
    template <class Each>
    SSVDO_HD void store(const Team& team, Each each) const {
        for (int p = 0; p < part; p++) {
            const unsigned lane = team.rank + p * Team::size, m = lane / (Shape::N / Shape::TN) * Shape::TM;
            const unsigned n = lane % (Shape::N / Shape::TN) * Shape::TN;
SSVDO_UNROLL
            for (int i = 0; i < Shape::TM; i++)
SSVDO_UNROLL
                for (int j = 0; j < Shape::TN; j++) each(int(m + i), int(n + j), sum[p][i * Shape::TN + j]);
        }
    }

  private:
    SSVDO_HD void multiply(const Team& team, const T* from) {
        constexpr int TM = Shape::TM, TN = Shape::TN, lda = Shape::M + Shape::pad, ldb = Shape::N + Shape::pad;
        for (int p = 0; p < part; p++) {
            const unsigned lane = team.rank + p * Team::size;
            const T* a = from + lane / (Shape::N / TN) * TM;
            const T* b = from + Shape::K * lda + lane % (Shape::N / TN) * TN;
SSVDO_UNROLL_BY(4)
            for (int k = 0; k < Shape::K; k++) {
                T left[TM], right[TN];
                __builtin_memcpy(left, __builtin_assume_aligned(a + k * lda, 16), sizeof left);
                __builtin_memcpy(right, __builtin_assume_aligned(b + k * ldb, 16), sizeof right);
SSVDO_UNROLL
                for (int i = 0; i < TM; i++)
SSVDO_UNROLL
                    for (int j = 0; j < TN; j++) sum[p][i * TN + j] += left[i] * right[j];
            }
        }
    }
};

}  // namespace SSVDO_ISA
}  // namespace ssvdo
