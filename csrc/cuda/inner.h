// The inner part's kernels: packed K -> G and the mixer M, and back (core/skew.h).
//
// Cayley: A = I + K is inverted by blocks of 64 without pivots, in one launch for all layers: step p turns the whole
// matrix from one buffer into another (Gauss-Jordan in blocks), so that a layer's teams meet once a step. Without pivots
// digits are lost as |K|^2 grows, so the inverse is always tested: while the residual R = I - A M is above rounding,
// Newton's step M + M R squares it.
#pragma once

#include "../core/skew.h"
#include "../core/tile.h"
#include "api.h"

namespace ssvdo {
namespace SSVDO_ISA {

template <class T>
struct InnerKernel {
    static constexpr int min_blocks = 2;
    InnerGroup<T> g;

    SSVDO_HD ptrdiff_t square() const { return ptrdiff_t(g.k) * g.k; }
    SSVDO_HD MixerShape mixer() const { return {g.k, g.l, g.q, g.width}; }

    // Row `row` of M from G(i, j).
    template <class Team, class G>
    SSVDO_HD void write_row(const Team& team, int layer, int row, G get) const {
        const MixerRow<T> m = mixer_row(mixer(), g.singular[layer], g.shift[layer], row);
        T* to = g.mixer[layer] + ptrdiff_t(row) * g.width;
        for (int j = team.rank; j < g.width; j += team.size) {
            T made = m.source >= 0 && j < g.k ? m.factor * get(m.source, j) : T(0);
            to[j] = j == m.at && m.value != T(0) ? made + m.value : made;
        }
    }
};

template <class T>
struct Skew {  // K and its parts from the packed upper triangle
    const T* packed;
    int k;
    SSVDO_HD T operator()(int i, int j) const {
        return i < j ? packed[packed_row(i, k) + j] : i > j ? -packed[packed_row(j, k) + i] : T(0);
    }
};

template <class T>
struct InvertKernel : InnerKernel<T> {
    using Shape = Square<T>;
    static constexpr int B = Shape::M, ld = B + 1, min_blocks = 1;
    int blocks;  // that share a layer
    static constexpr int needs = Shape::shared + 2 * B * ld + 2 * B + 256;
    static_assert(needs * sizeof(T) <= 99 * 1024, "beyond what a block may have on sm_86, sm_89 and sm_120");
    int count() const { return blocks; }
    int shared() const { return needs; }

    struct Shifted {  // A = I + K
        static constexpr bool row_major = true;
        Skew<T> K;
        SSVDO_HD T operator()(int i, int j) const {
            return i < K.k && j < K.k ? K(i, j) + (i == j ? T(1) : T(0)) : T(0);
        }
    };

    // D (b x b, in shared memory) becomes its inverse; `row` and `column`: B elements each.
    template <class Team>
    static SSVDO_HD void gauss_jordan(const Team& team, T* D, T* row, T* column, int b) {
        for (int p = 0; p < b; p++) {
            team.sync();
            for (int i = team.rank; i < b; i += team.size) row[i] = D[p * ld + i], column[i] = D[i * ld + p];
            team.sync();
            const T inverse = T(1) / row[p];
            for (int e = team.rank; e < b * b; e += team.size) {
                const int i = e / b, j = e % b;
                T& x = D[i * ld + j];
                if (i == p)
                    x = j == p ? inverse : row[j] * inverse;
                else
                    x = j == p ? -column[i] * inverse : x - column[i] * (row[j] * inverse);
            }
        }
        team.sync();
    }

    template <class Team>
    SSVDO_HD void operator()(const Team& team, int block, int layer, T* shared) const {
        const auto& g = this->g;
        const int k = g.k, n = (k + B - 1) / B;
        const Skew<T> K{g.packed[layer], k};
        const ptrdiff_t square = this->square();
        T *D = shared + Shape::shared, *turned = D + B * ld, *row = turned + B * ld, *column = row + B;
        T* partial = column + B;
        T *other = g.work + 2 * layer * square, *residual = other + square, *now = g.saved[layer];
        unsigned* gate = g.gate + layer;
        unsigned meetings = 0;
        const auto meet = [&] { team.meet(gate, blocks, ++meetings); };
        if (n % 2) swap(now, other);  // n steps end in `saved`
        for (ptrdiff_t e = ptrdiff_t(block) * team.size + team.rank; e < square; e += ptrdiff_t(blocks) * team.size) {
            const int i = int(e / k), j = int(e % k);
            now[e] = K(i, j) + (i == j ? T(1) : T(0));
        }
        meet();
        const int first = block * n * n / blocks, last = (block + 1) * n * n / blocks;  // this team's tiles, row by row
        for (int p = 0; p < n; p++, swap(now, other)) {
            const int p0 = p * B, b = k - p0 < B ? k - p0 : B;
            const auto old = matrix<T>(static_cast<const T*>(now), k, k, k);
            if (first < last) {
                for (int e = team.rank; e < b * b; e += team.size)
                    D[e / b * ld + e % b] = now[ptrdiff_t(p0 + e / b) * k + p0 + e % b];
                gauss_jordan(team, D, row, column, b);
            }
            const auto inverse = matrix<T>(static_cast<const T*>(D), b, b, ld);
            int held = -1;  // the row of tiles for which `turned` holds A_ip D
            for (int tile = first; tile < last; tile++) {
                const int ti = tile / n, tj = tile % n, i0 = ti * B, j0 = tj * B;
                if (ti != p && held != ti) {
                    Sums<Shape, Team> sums;
                    sums.clear();
                    sums.add(team, shared, i0, 0, b, part(now, p0, b), inverse);
                    sums.store(team, [&](int i, int j, T sum) { turned[i * ld + j] = sum; });
                    team.sync();
                    held = ti;
                }
                Sums<Shape, Team> sums;
                sums.clear();
                const auto band = matrix<T>(static_cast<const T*>(now + ptrdiff_t(p0) * k), b, k, k);
                if (tj != p)
                    sums.add(team, shared, 0, j0, b, ti == p ? inverse : matrix<T>(static_cast<const T*>(turned), B, b, ld),
                             band);
                sums.store(team, [&](int i, int j, T sum) {
                    const int m = i0 + i, c = j0 + j;
                    if (m >= k || c >= k) return;
                    T made;
                    if (ti == p)
                        made = tj == p ? D[i * ld + j] : sum;
                    else
                        made = tj == p ? -turned[i * ld + j] : old(m, c) - sum;
                    other[ptrdiff_t(m) * k + c] = made;
                });
            }
            meet();
        }
        T before = T(0);
        const T rounding = (sizeof(T) == 4 ? T(1.1920929e-7) : T(2.220446049250313e-16)) * T(4 * k);
        for (int step = 0;; step++) {
            const T size = test(team, shared, partial, K, now, residual, block, layer, first, last, n, meet);
            if (size <= rounding || step == 8 || !(size < T(1)) || (step && size >= before / 2)) {
                if (block == 0 && team.rank == 0) g.info[layer] = size < T(inverse_residual) ? 0 : 1;
                break;
            }
            before = size;
            for (int tile = first; tile < last; tile++) {
                const int i0 = tile / n * B, j0 = tile % n * B;
                Sums<Shape, Team> sums;
                sums.clear();
                sums.add(team, shared, i0, j0, k, matrix<T>(static_cast<const T*>(now), k, k, k),
                         matrix<T>(static_cast<const T*>(residual), k, k, k));
                sums.store(team, [&](int i, int j, T sum) {
                    const ptrdiff_t e = ptrdiff_t(i0 + i) * k + j0 + j;
                    if (i0 + i < k && j0 + j < k) other[e] = now[e] + sum;
                });
            }
            swap(now, other);
            meet();
        }
        T* saved = g.saved[layer];
        for (ptrdiff_t e = ptrdiff_t(block) * team.size + team.rank; e < square; e += ptrdiff_t(blocks) * team.size) {
            const T value = now[e];
            if (saved != now) saved[e] = value;
            g.G[layer][e] = 2 * value - (e / k == e % k ? T(1) : T(0));
        }
        for (int r = block; r < this->mixer().rows(); r += blocks)
            this->write_row(team, layer, r, [&](int i, int j) {
                return 2 * now[ptrdiff_t(i) * k + j] - (i == j ? T(1) : T(0));
            });
    }

  private:
    static constexpr double inverse_residual = 0.1;  // of I - A M: beyond, M is no inverse to speak of

    SSVDO_HD static void swap(T*& a, T*& b) {
        T* c = a;
        a = b, b = c;
    }
    // Columns p0 .. p0 + b of the matrix at `data`, as k x b.
    SSVDO_HD auto part(const T* data, int p0, int b) const { return matrix<T>(data + p0, this->g.k, b, this->g.k); }

    // |I - A M|_F, the same bits in every team; writes the residual.
    template <class Team, class Meet>
    SSVDO_HD T test(const Team& team, T* shared, T* partial, const Skew<T>& K, const T* M, T* residual, int block,
                    int layer, int first, int last, int n, const Meet& meet) const {
        const int k = this->g.k;
        T own[Sums<Shape, Team>::part] = {};
        for (int tile = first; tile < last; tile++) {
            const int i0 = tile / n * B, j0 = tile % n * B;
            Sums<Shape, Team> sums;
            sums.clear();
            sums.add(team, shared, i0, j0, k, Shifted{K}, matrix<T>(M, k, k, k));
            sums.store(team, [&](int i, int j, T sum) {
                if (i0 + i >= k || j0 + j >= k) return;
                const T r = (i0 + i == j0 + j ? T(1) : T(0)) - sum;
                residual[ptrdiff_t(i0 + i) * k + j0 + j] = r;
                own[0] += r * r;
            });
        }
        partial[team.rank] = own[0];
        team.sync();
        T* norms = this->g.norms + layer * max_blocks;
        if (team.rank == 0) {
            T sum = 0;
            for (int i = 0; i < team.size; i++) sum += partial[i];
            norms[block] = sum;
        }
        meet();
        T sum = 0;
        for (int i = 0; i < blocks; i++) sum += norms[i];  // written again after the meeting that ends Newton's step
        return root(sum);
    }
};

template <class T>
struct FirstOrderKernel : InnerKernel<T> {  // G = I - 2K and K; one team a row of G or M
    int count() const { return this->mixer().rows() + this->g.k; }
    int shared() const { return 1; }
    template <class Team>
    SSVDO_HD void operator()(const Team& team, int row, int layer, T*) const {
        const Skew<T> K{this->g.packed[layer], this->g.k};
        const auto G = [&](int i, int j) { return (i == j ? T(1) : T(0)) - 2 * K(i, j); };
        const int rows = this->mixer().rows(), k = this->g.k;
        if (row < rows) return this->write_row(team, layer, row, G);
        for (int i = row - rows, j = team.rank; j < k; j += team.size) {
            this->g.G[layer][ptrdiff_t(i) * k + j] = G(i, j);
            this->g.saved[layer][ptrdiff_t(i) * k + j] = K(i, j);
        }
    }
};

// -- backward: dB from dM, dG = diag(S + dS) dB, d shift = rows of dB * G; Z = -2 M^T dG M^T; d packed = upper(Z - Z^T) -----
template <class T>
struct RotationGradient {  // dG
    static constexpr bool row_major = true;
    MixerShape shape;
    const T *d_mixer, *singular, *shift;
    SSVDO_HD T inner(int i, int j) const { return inner_gradient(shape, d_mixer + j, shape.width, singular, i); }
    SSVDO_HD T operator()(int i, int j) const {
        return i < shape.k && j < shape.k ? (singular[i] + shift[i]) * inner(i, j) : T(0);
    }
};

template <class T>
struct HalfwayKernel : InnerKernel<T> {  // work = dG M^T (Cayley), and d shift
    using Shape = Large<T>;
    static constexpr int rows = 32, share = 8;  // rows of d shift a team, lanes a row
    int product_tiles() const { return this->g.cayley ? down() * across() : 0; }
    SSVDO_HD int down() const { return (this->g.k + Shape::M - 1) / Shape::M; }
    SSVDO_HD int across() const { return (this->g.k + Shape::N - 1) / Shape::N; }
    int count() const { return product_tiles() + (this->g.k + rows - 1) / rows; }
    int shared() const { return Shape::shared; }

    template <class Team>
    SSVDO_HD void operator()(const Team& team, int tile, int layer, T* shared) const {
        const auto& g = this->g;
        const int k = g.k, products = g.cayley ? down() * across() : 0;
        const RotationGradient<T> dG{this->mixer(), g.mixer[layer], g.singular[layer], g.shift[layer]};
        if (tile >= products) {
            const int first = (tile - products) * rows;
            for (int lane = team.rank; lane < rows * share; lane += team.size) {
                const int i = first + lane / share;
                T sum = 0;
                for (int j = lane % share; i < k && j < k; j += share)
                    sum += dG.inner(i, j) * g.G[layer][ptrdiff_t(i) * k + j];
                shared[lane] = sum;
            }
            team.sync();
            for (int i = team.rank; i < rows && first + i < k; i += team.size) {
                T sum = 0;
                for (int part = 0; part < share; part++) sum += shared[i * share + part];
                g.d_shift[layer][first + i] = sum;
            }
            return;
        }
        const int m0 = tile / across() * Shape::M, n0 = tile % across() * Shape::N;
        Sums<Shape, Team> sums;
        sums.clear();
        sums.add(team, shared, m0, n0, k, dG, transposed<T>(static_cast<const T*>(g.saved[layer]), k, k, k));
        T* to = g.work + layer * this->square();
        sums.store(team, [&](int m, int n, T sum) {
            if (m0 + m < k && n0 + n < k) to[ptrdiff_t(m0 + m) * k + n0 + n] = sum;
        });
    }
};

template <class T>
struct PackKernel : InnerKernel<T> {  // d packed from work and M (Cayley), or from dG: Z = -2 dG
    using Shape = Square<T>;
    static constexpr int B = Shape::M, ld = B + 1;
    int count() const { return side() * (side() + 1) / 2; }
    SSVDO_HD int side() const { return (this->g.k + B - 1) / B; }
    int shared() const { return Shape::shared + B * ld; }

    // A tile of Z; each(i, j, value).
    template <class Team, class Each>
    SSVDO_HD void part(const Team& team, T* shared, int layer, int m0, int n0, Each each) const {
        const auto& g = this->g;
        const int k = g.k;
        if (g.cayley) {
            Sums<Shape, Team> sums;
            sums.clear();
            sums.add(team, shared, m0, n0, k, transposed<T>(static_cast<const T*>(g.saved[layer]), k, k, k),
                     matrix<T>(static_cast<const T*>(g.work + layer * this->square()), k, k, k));
            return sums.store(team, [&](int i, int j, T sum) { each(i, j, -2 * sum); });
        }
        const RotationGradient<T> dG{this->mixer(), g.mixer[layer], g.singular[layer], g.shift[layer]};
        for (int e = team.rank; e < B * B; e += team.size) each(e / B, e % B, -2 * dG(m0 + e / B, n0 + e % B));
    }

    template <class Team>
    SSVDO_HD void operator()(const Team& team, int tile, int layer, T* shared) const {
        int ti = 0;
        for (int left = tile; left >= side() - ti; ti++) left -= side() - ti, tile = left;
        const int i0 = ti * B, j0 = (ti + tile) * B, k = this->g.k;
        T* below = shared + Shape::shared;  // the tile below the diagonal, transposed
        part(team, shared, layer, j0, i0, [&](int i, int j, T z) { below[j * ld + i] = z; });
        team.sync();
        T* to = this->g.d_packed[layer];
        part(team, shared, layer, i0, j0, [&](int i, int j, T z) {
            if (i0 + i < j0 + j && j0 + j < k) to[packed_row(i0 + i, k) + j0 + j] = z - below[i * ld + j];
        });
    }
};

}  // namespace SSVDO_ISA
}  // namespace ssvdo
