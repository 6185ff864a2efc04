// The inner part's kernels: packed K -> (I + K)^-1 and the mixer M, and back (core/skew.h).
//
// Cayley: A = I + K is inverted by blocks of 64 without pivots, in one launch for all layers: step p turns the whole
// matrix from one buffer into another (Gauss-Jordan in blocks), so that a layer's teams meet once a step. The next
// step's pivot block is inverted by one team as soon as it is made, while the others make their tiles. Without pivots
// digits are lost as |K|^2 grows, so the inverse is always tested: while the residual R = I - A M is above rounding,
// Newton's step M + M R squares it. At first 64 probes w of fixed random signs ask for R, where that is less work: the
// mean of |R w|^2 is |R|_F^2. Where half the limit is found, |R|_F is above the limit with a probability of at most
// exp(-6), and above ten times the limit of 5e-8 (docs/kernels.md). Where more is found, R is formed.
#pragma once

#include "../core/eliminate.h"
#include "../core/skew.h"
#include "api.h"

namespace ssvdo {
namespace SSVDO_ISA {

template <class T>
struct InnerKernel {
    using Kind = typename OwnKind<T>::type;
    static constexpr int min_blocks = sizeof(T) == 4 ? 2 : 1;
    InnerGroup<T> g;

    SSVDO_HD ptrdiff_t square() const { return ptrdiff_t(g.k) * g.k; }
    SSVDO_HD MixerShape mixer() const { return {g.k, g.l, g.q, g.width}; }
    // G(i, j) from `saved`: 2 (I + K)^-1 - I, or I - 2K.
    SSVDO_HD T rotation(T saved, int i, int j) const {
        const T one = i == j ? T(1) : T(0);
        return g.cayley ? 2 * saved - one : one - 2 * saved;
    }

    // What M has of element (i, j) of `saved`.
    SSVDO_HD void mix(int layer, int i, int j, T saved) const {
        const MixerShape shape = mixer();
        const T rotated = rotation(saved, i, j);
        const auto put = [&](int row) {
            const MixerRow<T> m = mixer_row(shape, g.singular[layer], g.shift[layer], row);
            g.mixer[layer][ptrdiff_t(row) * shape.width + j] = m.factor * rotated + (j == m.at ? m.value : T(0));
        };
        const int usable = shape.k - shape.q;
        put(i < usable ? i : shape.width + shape.l + i - usable);
        if (i < shape.l) put(shape.width + i);
    }
    // And of row `row` what has nothing of it.
    template <class Team>
    SSVDO_HD void fill_row(const Team& team, int layer, int row) const {
        const MixerRow<T> m = mixer_row(mixer(), g.singular[layer], g.shift[layer], row);
        T* to = g.mixer[layer] + ptrdiff_t(row) * g.width;
        for (int j = (m.source < 0 ? 0 : g.k) + team.rank; j < g.width; j += team.size) to[j] = j == m.at ? m.value : T(0);
    }
    // A whole k x k matrix by rows: as A, and as B.
    SSVDO_HD Matrix<T> left(const T* data) const { return {data, g.k, g.k, unsigned(g.k), true}; }
    SSVDO_HD Matrix<T> right(const T* data) const { return {data, g.k, g.k, unsigned(g.k), false}; }
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
struct Shifted {  // I + K, and 0 outside
    Skew<T> K;
    SSVDO_HD T operator()(int i, int j) const { return i < K.k && j < K.k ? K(i, j) + (i == j ? T(1) : T(0)) : T(0); }
};

template <class T>
struct InvertKernel : InnerKernel<T> {
    using typename InnerKernel<T>::Kind;
    template <class Team>
    using Tile = Sums<T, 64, Team>;
    static constexpr int B = 64, ld = B + 4, elements = 2 * B * ld + 4 * B + lanes;
    static constexpr size_t needs = Stages<Kind, B>::bytes + elements * sizeof(T);
    static_assert(needs <= 99 * 1024, "beyond what a block may have on sm_86, sm_89 and sm_120");
    int blocks;  // that share a layer
    SSVDO_HD int side() const { return (this->g.k + B - 1) / B; }
    int most() const { return side() * side() < max_blocks ? side() * side() : max_blocks; }
    int count() const { return blocks; }
    size_t shared() const { return needs; }

    template <class Team>
    SSVDO_HD void operator()(const Team& team, int block, int layer, unsigned char* memory) const {
        const auto& g = this->g;
        const int k = g.k, n = side();
        const Shifted<T> A{{g.packed[layer], k}};
        const ptrdiff_t square = this->square();
        T *D = reinterpret_cast<T*>(memory + Stages<Kind, B>::bytes), *turned = D + B * ld, *edge = turned + B * ld;
        T* partial = edge + 4 * B;
        T *other = g.work + 2 * layer * square, *residual = other + square, *now = g.saved[layer];
        unsigned* gate = g.gate + layer;
        unsigned meetings = 0;
        const auto meet = [&] { team.meet(gate, blocks, ++meetings); };
        if (n % 2) swap(now, other);  // n steps end in `saved`
        // Inverts a pivot block of b rows, get(i, j), where put(i, j, value) says.
        const auto invert = [&](int b, auto get, auto put) {
            Block64<T, Team> own;
            own.load(team, b, get);
            own.template eliminate<true>(team, edge);
            own.store(team, [&](int i, int j, T value) {
                if (i < b && j < b) put(i, j, value);
            });
        };
        // Step p, from at(i, j) into `other`: column: A's columns p, by rows; band: its rows p, by columns. D is there.
        const auto step = [&](int p, const auto& column, const auto& band, auto at) {
            const int b = k - p * B < B ? k - p * B : B;
            // The team's tiles, row by row; the next pivot block's is the first team's, and as much work as `ahead`: it is
            // inverted where it lies, as soon as it is there.
            const int next = p + 1 < n ? (p + 1) * (n + 1) : n * n, ahead = p + 1 < n ? 3 : 0;
            const auto before = [&](int team) {
                const int work = team * (n * n - (ahead > 0) + ahead) / blocks;
                return work > ahead ? work - ahead : 0;
            };
            const int first = before(block), last = before(block + 1), from = ahead && block == 0 ? -1 : first;
            int held = -1;  // the row of tiles for which `turned` holds A_ip D
            for (int job = from; job < last; job++) {
                const int tile = job < 0 ? next : job + (job >= next);
                const int ti = tile / n, tj = tile % n, i0 = ti * B, j0 = tj * B;
                if (ti != p && held != ti) {
                    Tile<Team> sums;
                    sums.clear();
                    sums.add(team, memory, i0, 0, 0, b, column, Matrix<T>(D, b, b, ld, false));
                    sums.store(team, [&](int i, int j, T sum) { turned[i * ld + j] = sum; });
                    team.sync();
                    held = ti;
                }
                Tile<Team> sums;
                sums.clear();
                if (tj != p)
                    sums.add(team, memory, 0, j0, 0, b, Matrix<T>(ti == p ? D : turned, ti == p ? b : B, b, ld, true), band);
                sums.store(team, [&](int i, int j, T sum) {
                    const int m = i0 + i, c = j0 + j;
                    if (m >= k || c >= k) return;
                    T made;
                    if (ti == p)
                        made = tj == p ? D[i * ld + j] : sum;
                    else
                        made = tj == p ? -turned[i * ld + j] : at(m, c) - sum;
                    other[ptrdiff_t(m) * k + c] = made;
                    if (p + 1 == n) this->mix(layer, m, c, made);
                });
                if (tile != next) continue;
                team.sync();
                T* there = other + ptrdiff_t(i0) * k + j0;
                invert(k - i0 < B ? k - i0 : B, [&](int i, int j) { return there[ptrdiff_t(i) * k + j]; },
                       [&](int i, int j, T value) { there[ptrdiff_t(i) * k + j] = value; });
            }
            meet();
            swap(now, other);
        };
        // Nobody waits for the first pivot block, and K is never written out.
        invert(k < B ? k : B, A, [&](int i, int j, T value) { D[i * ld + j] = value; });
        team.sync();
        step(0, computed<T, false>(A), computed<T, false>([=](int j, int i) { return A(i, j); }), A);
        for (int p = 1; p < n; p++) {
            const int p0 = p * B, b = k - p0 < B ? k - p0 : B;
            for (int e = team.rank; e < b * b; e += team.size)
                D[e / b * ld + e % b] = now[ptrdiff_t(p0 + e / b) * k + p0 + e % b];
            team.sync();
            const T* from = now;
            step(p, Matrix<T>(now + p0, k, b, k, true), Matrix<T>(now + ptrdiff_t(p0) * k, k, b, k, false),
                 [=](int i, int j) { return from[ptrdiff_t(i) * k + j]; });
        }
        const int first = block * n * n / blocks, last = (block + 1) * n * n / blocks;  // of tiles, row by row
        const auto share = [&](int tiles) { return (tiles + blocks - 1) / blocks; };  // of the team with most
        T before = T(0);
        const T rounding = (sizeof(T) == 4 ? T(1.1920929e-7) : T(2.220446049250313e-16)) * T(4 * k);
        bool sound = false, mended = false;
        if (share(n * n) > 2 * share(n) + 1) {
            sound = probed(team, memory, partial, A, now, residual, block, layer, n, meet) <= rounding / 2;
            if (!sound) meet();  // all have read the norms
            if (sound && block == 0 && team.rank == 0) g.info[layer] = 0;
        }
        for (int step = 0; !sound; step++) {
            const T size = test(team, memory, partial, A, now, residual, block, layer, first, last, n, meet);
            if (size <= rounding || step == 8 || !(size < T(1)) || (step && size >= before / 2)) {
                if (block == 0 && team.rank == 0) g.info[layer] = size < T(inverse_residual) ? 0 : 1;
                break;
            }
            before = size;
            for (int tile = first; tile < last; tile++) {
                const int i0 = tile / n * B, j0 = tile % n * B;
                Tile<Team> sums;
                sums.clear();
                sums.add(team, memory, i0, j0, 0, k, this->left(now), this->right(residual));
                sums.store(team, [&](int i, int j, T sum) {
                    const ptrdiff_t e = ptrdiff_t(i0 + i) * k + j0 + j;
                    if (i0 + i < k && j0 + j < k) other[e] = now[e] + sum;
                });
            }
            swap(now, other);
            mended = true;
            meet();
        }
        T* saved = g.saved[layer];
        const ptrdiff_t all = ptrdiff_t(blocks) * team.size;
        for (ptrdiff_t e = ptrdiff_t(block) * team.size + team.rank; mended && e < square; e += all) {
            const T made = now[e];
            if (saved != now) saved[e] = made;
            this->mix(layer, int(e / k), int(e % k), made);
        }
        for (int r = block; r < this->mixer().rows(); r += blocks) this->fill_row(team, layer, r);
    }

  private:
    static constexpr double inverse_residual = 0.1;  // of I - A M: beyond, M is no inverse to speak of

    SSVDO_HD static void swap(T*& a, T*& b) {
        T* c = a;
        a = b, b = c;
    }

    static constexpr int probes = B;
    SSVDO_HD static T sign(int i, int probe) {  // by the last steps of MurmurHash3
        std::uint32_t x = std::uint32_t(i) * probes + probe;
        x = (x ^ x >> 16) * 0x85ebca6bu;
        x = (x ^ x >> 13) * 0xc2b2ae35u;
        return (x ^ x >> 16) & 1 ? T(1) : T(-1);
    }

    // |I - A M|_F by probes W: |W - A (M W)|_F / sqrt(probes). product: k x probes.
    template <class Team, class Meet>
    SSVDO_HD T probed(const Team& team, unsigned char* memory, T* partial, const Shifted<T>& A, const T* M, T* product,
                      int block, int layer, int n, const Meet& meet) const {
        const int k = this->g.k, first = block * n / blocks, last = (block + 1) * n / blocks;
        for (int tile = first; tile < last; tile++) {
            Tile<Team> sums;
            sums.clear();
            sums.add(team, memory, tile * B, 0, 0, k, this->left(M),
                     computed<T, true>([](int column, int row) { return sign(row, column); }));
            sums.store(team, [&](int i, int j, T sum) {
                if (tile * B + i < k) product[ptrdiff_t(tile * B + i) * probes + j] = sum;
            });
        }
        meet();
        T own = 0;
        for (int tile = first; tile < last; tile++) {
            Tile<Team> sums;
            sums.clear();
            sums.add(team, memory, tile * B, 0, 0, k, computed<T, true>(A), Matrix<T>(product, probes, k, probes, false));
            sums.store(team, [&](int i, int j, T sum) {
                const T r = sign(tile * B + i, j) - sum;
                if (tile * B + i < k) own += r * r;
            });
        }
        return norm(team, partial, own, block, layer, meet) / root(T(probes));
    }

    // |I - A M|_F, the same bits in every team; writes the residual.
    template <class Team, class Meet>
    SSVDO_HD T test(const Team& team, unsigned char* memory, T* partial, const Shifted<T>& A, const T* M, T* residual,
                    int block, int layer, int first, int last, int n, const Meet& meet) const {
        const int k = this->g.k;
        T own = 0;
        for (int tile = first; tile < last; tile++) {
            const int i0 = tile / n * B, j0 = tile % n * B;
            Tile<Team> sums;
            sums.clear();
            sums.add(team, memory, i0, j0, 0, k, computed<T, true>(A), this->right(M));
            sums.store(team, [&](int i, int j, T sum) {
                if (i0 + i >= k || j0 + j >= k) return;
                const T r = (i0 + i == j0 + j ? T(1) : T(0)) - sum;
                residual[ptrdiff_t(i0 + i) * k + j0 + j] = r;
                own += r * r;
            });
        }
        return norm(team, partial, own, block, layer, meet);
    }

    // The root of the sum of all teams' `own`, the same bits in every team.
    template <class Team, class Meet>
    SSVDO_HD T norm(const Team& team, T* partial, T own, int block, int layer, const Meet& meet) const {
        partial[team.rank] = own;
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
struct FirstOrderKernel : InnerKernel<T> {  // K and M; one team a row of either
    int count() const { return this->g.k + this->mixer().rows(); }
    size_t shared() const { return 0; }
    template <class Team>
    SSVDO_HD void operator()(const Team& team, int row, int layer, unsigned char*) const {
        const Skew<T> K{this->g.packed[layer], this->g.k};
        const int k = this->g.k;
        if (row >= k) return this->fill_row(team, layer, row - k);
        for (int j = team.rank; j < k; j += team.size) {
            const T saved = K(row, j);
            this->g.saved[layer][ptrdiff_t(row) * k + j] = saved;
            this->mix(layer, row, j, saved);
        }
    }
};

// -- backward: dB from dM, dG = diag(S + dS) dB, d shift = rows of dB * G; Z = -2 M^T dG M^T; d packed = upper(Z - Z^T) -----
template <class T>
struct RotationGradient {  // dG
    MixerShape shape;
    const T *d_mixer, *singular, *shift;
    SSVDO_HD T inner(int i, int j) const { return inner_gradient(shape, d_mixer + j, shape.width, singular, i); }
    SSVDO_HD T operator()(int i, int j) const {
        return i < shape.k && j < shape.k ? (singular[i] + shift[i]) * inner(i, j) : T(0);
    }
};

template <class T>
struct HalfwayKernel : InnerKernel<T> {  // work = dG M^T (Cayley), and d shift
    using typename InnerKernel<T>::Kind;
    static constexpr int M = 128, N = 64, rows = 32, share = 8;  // rows of d shift a team, lanes a row
    SSVDO_HD int across() const { return (this->g.k + N - 1) / N; }
    SSVDO_HD int products() const { return this->g.cayley ? (this->g.k + M - 1) / M * across() : 0; }
    int count() const { return products() + (this->g.k + rows - 1) / rows; }
    size_t shared() const { return Stages<Kind, M>::bytes; }

    template <class Team>
    SSVDO_HD void operator()(const Team& team, int tile, int layer, unsigned char* memory) const {
        const auto& g = this->g;
        const int k = g.k;
        const T* saved = g.saved[layer];
        const RotationGradient<T> dG{this->mixer(), g.mixer[layer], g.singular[layer], g.shift[layer]};
        if (tile >= products()) {
            T* shared = reinterpret_cast<T*>(memory);
            const int first = (tile - products()) * rows;
            for (int lane = team.rank; lane < rows * share; lane += team.size) {
                const int i = first + lane / share;
                T sum = 0;
                for (int j = lane % share; i < k && j < k; j += share)
                    sum += dG.inner(i, j) * this->rotation(saved[ptrdiff_t(i) * k + j], i, j);
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
        const int m0 = tile / across() * M, n0 = tile % across() * N;
        Sums<T, M, Team> sums;
        sums.clear();
        sums.add(team, memory, m0, n0, 0, k, computed<T, true>(dG), this->left(saved));  // lines of M^T are M's rows
        T* to = g.work + layer * this->square();
        sums.store(team, [&](int m, int n, T sum) {
            if (m0 + m < k && n0 + n < k) to[ptrdiff_t(m0 + m) * k + n0 + n] = sum;
        });
    }
};

template <class T>
struct PackKernel : InnerKernel<T> {  // d packed from work and M (Cayley), or from dG: Z = -2 dG
    using typename InnerKernel<T>::Kind;
    static constexpr int B = 64, ld = B + 1;
    static constexpr size_t sums_shared = Stages<Kind, B>::bytes;
    int count() const { return side() * (side() + 1) / 2; }
    SSVDO_HD int side() const { return (this->g.k + B - 1) / B; }
    size_t shared() const { return sums_shared + B * ld * sizeof(T); }

    // A tile of Z; each(i, j, value).
    template <class Team, class Each>
    SSVDO_HD void part(const Team& team, unsigned char* memory, int layer, int m0, int n0, Each each) const {
        const auto& g = this->g;
        if (g.cayley) {
            Sums<T, B, Team> sums;
            sums.clear();
            sums.add(team, memory, m0, n0, 0, g.k, this->right(g.saved[layer]),
                     this->right(g.work + layer * this->square()));
            return sums.store(team, [&](int i, int j, T sum) { each(i, j, -2 * sum); });
        }
        const RotationGradient<T> dG{this->mixer(), g.mixer[layer], g.singular[layer], g.shift[layer]};
        for (int e = team.rank; e < B * B; e += team.size) each(e / B, e % B, -2 * dG(m0 + e / B, n0 + e % B));
    }

    template <class Team>
    SSVDO_HD void operator()(const Team& team, int tile, int layer, unsigned char* memory) const {
        int ti = 0;
        for (int left = tile; left >= side() - ti; ti++) left -= side() - ti, tile = left;
        const int i0 = ti * B, j0 = (ti + tile) * B, k = this->g.k;
        T* below = reinterpret_cast<T*>(memory + sums_shared);  // the tile below the diagonal, transposed
        part(team, memory, layer, j0, i0, [&](int i, int j, T z) { below[j * ld + i] = z; });
        team.sync();
        T* to = this->g.d_packed[layer];
        const auto put = [&](int i, int j, T z) {
            if (i0 + i < j0 + j && j0 + j < k) to[packed_row(i0 + i, k) + j0 + j] = z - below[i * ld + j];
        };
        if (i0 < j0) return part(team, memory, layer, i0, j0, put);
        for (int e = team.rank; e < B * B; e += team.size) put(e / B, e % B, below[e % B * ld + e / B]);
    }
};

}  // namespace SSVDO_ISA
}  // namespace ssvdo
