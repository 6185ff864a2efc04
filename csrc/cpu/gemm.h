// C = alpha A B + beta C on a CPU, in the manner of Goto and van de Geijn ("Anatomy of High-Performance Matrix
// Multiplication", 2008): panels of B are packed, a micro-kernel keeps MR x NR of C in registers.
//
// Compiled once an instruction set, in a namespace of its own (SSVDO_ISA): SSVDO_VECTOR is the register's bytes,
// SSVDO_ROWS and SSVDO_COLUMN_VECTORS the micro-kernel's size.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <type_traits>

#include "parallel.h"

namespace ssvdo {
namespace SSVDO_ISA {

// A matrix of any strides: element (i, j) at data[i * row + j * column].
template <class T>
struct View {
    T* data;
    ptrdiff_t row, column;
    View at(ptrdiff_t i, ptrdiff_t j) const { return {data + i * row + j * column, row, column}; }
    View transposed() const { return {data, column, row}; }
    T& operator()(ptrdiff_t i, ptrdiff_t j) const { return data[i * row + j * column]; }
    operator View<const T>() const { return {data, row, column}; }
};

template <class T>
struct Tile {
    static constexpr int lanes = SSVDO_VECTOR / int(sizeof(T));
    typedef T Vector __attribute__((vector_size(SSVDO_VECTOR), may_alias));
};

// Scratch memory that is given back when it goes out of scope; aligned to a cache line.
template <class T>
struct Scratch {
    T* data;
    explicit Scratch(size_t count) {
        data = static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 64) / 64 * 64));
        if (!data) std::abort();
    }
    ~Scratch() { std::free(data); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
};

// A panel of B, depth x NR (depth-major), zero-padded; a line of the cache at a time, whichever way B lies.
template <class T, int NR>
inline void pack_panel(View<const T> B, int depth, int columns, T* out) {
    constexpr int line = 64 / int(sizeof(T));
    for (int top = 0; top < depth; top += B.column == 1 ? 1 : line) {
        const int bottom = B.column == 1 ? top + 1 : top + line < depth ? top + line : depth;
        for (int j = 0; j < columns; j++)
            for (int p = top; p < bottom; p++) out[ptrdiff_t(p) * NR + j] = B(p, j);
        for (int p = top; p < bottom; p++)
            for (int j = columns; j < NR; j++) out[ptrdiff_t(p) * NR + j] = 0;
    }
}

// Rows of the panel that is packed next, asked for one by one while another is multiplied.
template <class T, int NR>
struct Ahead {
    View<const T> B;
    int left;
    Ahead(View<const T> next, int depth) : B(next), left(next.column == 1 ? depth : 0) {}
    void fetch() {
        if (left-- <= 0) return;
        for (int b = 0; b < NR * int(sizeof(T)); b += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(B.data) + b, 0, 2);
        B.data += B.row;
    }
};

// rows x columns of C (at most MR x NR, NR = V registers) from A, element (r, p) at a[r * a_row + p * a_column], and a
// packed panel of B, or, with `packed`, of one whose rows lie b_row apart, which is packed by the way. Always inline: what
// `next` and `packed` ask for costs nothing where they are null.
template <class T, int MR, int V>
__attribute__((always_inline)) inline void micro_kernel(
    int depth, const T* __restrict a, ptrdiff_t a_row, ptrdiff_t a_column, const T* __restrict b, T alpha, bool add,
    View<T> C, int rows, int columns, Ahead<T, Tile<T>::lanes * V>* next = nullptr,
    ptrdiff_t b_row = Tile<T>::lanes * V, T* __restrict packed = nullptr) {
    using Vector = typename Tile<T>::Vector;
    constexpr int lanes = Tile<T>::lanes, NR = lanes * V;
    Vector acc[MR][V] = {};
    for (int p = 0; p < depth; p++, a += a_column, b += b_row) {
        if (next && p % 4 == 0) next->fetch();
        if (a_column == 1 && p % 16 == 0)  // the next rows: each may lie on a page that the processor does not foresee
#pragma GCC unroll 32
            for (int r = 0; r < MR; r++) __builtin_prefetch(a + (MR + r) * a_row);
        Vector right[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
            __builtin_memcpy(&right[v], b + v * lanes, sizeof(Vector));  // unaligned
            if (packed) *reinterpret_cast<Vector*>(packed + ptrdiff_t(p) * NR + v * lanes) = right[v];
        }
#pragma GCC unroll 32
        for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) acc[r][v] += a[r * a_row] * right[v];
    }
    if (rows == MR && columns == NR && C.column == 1) {
#pragma GCC unroll 32
        for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) {
                T* to = &C(r, v * lanes);
                Vector value = alpha * acc[r][v], before;
                if (add) {
                    __builtin_memcpy(&before, to, sizeof before);  // unaligned
                    value += before;
                }
                __builtin_memcpy(to, &value, sizeof value);
            }
        return;
    }
    alignas(64) T buffer[MR * NR];
    __builtin_memcpy(buffer, acc, sizeof buffer);
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < columns; j++) C(r, j) = (add ? C(r, j) : T(0)) + alpha * buffer[r * NR + j];
}

// C (m x n) = alpha A (m x k) B (k x n) + (add ? C : 0), by `threads` threads; inside a parallel region, by one.
//
// Panels of B are packed; A is read where it lies, which is fastest for adjacent rows or columns of up to a few hundred.
template <class T>
inline void gemm(int m, int n, int k, T alpha, View<const T> A, View<const T> B, bool add, View<T> C, int threads) {
    constexpr int V = SSVDO_COLUMN_VECTORS, NR = Tile<T>::lanes * V, MR = SSVDO_ROWS;
    if (m <= 0 || n <= 0) return;
    if (k <= 0) {
        if (!add)
            for (int i = 0; i < m; i++)
                for (int j = 0; j < n; j++) C(i, j) = 0;
        return;
    }
    // Few rows: many panels of little depth, so that B is read row by row. Many: one deep panel, and A is read so.
    const bool flat = 2 * m < n;
    const int KC = flat ? 80 : 384, most = flat ? 16 : 1;
    int panels = (n + NR - 1) / NR;
    // A task packs a group of panels and multiplies them with a run of rows: enough tasks for every thread, no more.
    int workers = may_spread(threads) && 2.0 * m * n * k > 4e6 ? threads : 1;
    int group = (panels + workers - 1) / workers < most ? (panels + workers - 1) / workers : most;
    int groups = (panels + group - 1) / group;
    int cuts = groups % workers == 0 ? 1 : (2 * workers + groups - 1) / groups;
    int height = ((m + cuts - 1) / cuts + MR - 1) / MR * MR;
    cuts = (m + height - 1) / height;
    parallel_for(groups * cuts, workers, [&](int task) {
        int first = task / cuts * group, count = panels - first < group ? panels - first : group;
        int top = task % cuts * height, bottom = m - top < height ? m : top + height;
        Scratch<T> packed(size_t(NR) * (k < KC ? k : KC));
        for (int p = 0; p < k; p += KC) {
            int depth = k - p < KC ? k - p : KC;
            for (int q = 0; q < count; q++) {
                int j = (first + q) * NR, columns = n - j < NR ? n - j : NR, i = top;
                const int below = k - p - depth;
                const View<const T> panel = B.at(p, j);
                Ahead<T, NR> ahead(B.at(p + depth, j), columns == NR && flat ? (below < KC ? below : KC) : 0);
                auto tiles = [&](auto size, auto... more) {  // as many as there are; a row alone waits for each sum
                    constexpr int R = decltype(size)::value;
                    for (; i + R <= bottom; i += R)
                        micro_kernel<T, R, V>(depth, &A(i, p), A.row, A.column, packed.data, alpha, add || p > 0,
                                              C.at(i, j), R, columns, more...);
                };
                if (panel.column == 1 && columns == NR && bottom - top >= MR) {
                    micro_kernel<T, MR, V>(depth, &A(i, p), A.row, A.column, panel.data, alpha, add || p > 0, C.at(i, j), MR,
                                           columns, &ahead, panel.row, packed.data);
                    i += MR;
                } else {
                    pack_panel<T, NR>(panel, depth, columns, packed.data);
                }
                if (flat) tiles(std::integral_constant<int, MR>(), &ahead);
                tiles(std::integral_constant<int, MR>());
                tiles(std::integral_constant<int, 4>());
                tiles(std::integral_constant<int, 2>());
                tiles(std::integral_constant<int, 1>());
            }
        }
    });
}

}  // namespace SSVDO_ISA
}  // namespace ssvdo
