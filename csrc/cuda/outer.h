// The outer part's kernels, a launch each way: the algebra of ssvdo_kernels/ops/outer.py and complement.py as a plan of
// products, each shared out among a layer's teams, which meet after it. There is one place that computes products, so that
// the code of the tiles is there once; which product comes next is read from shared memory.
#pragma once

#include "../core/eliminate.h"
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

template <class T>
struct Right {  // by rows, or by columns (along); times `factor`
    using Stored = T;
    Matrix<T> matrix;
    T factor;
    bool along;
    SSVDO_HD void four(int line, int k, std::uint32_t* out) const { matrix.four(line, k, out); }
    SSVDO_HD T made(T x) const { return x * factor; }
};

// out (rows x columns) = alpha A (B factor) + beta addend, and row i of that times 1 / S_i^2 where it is `divided`. The
// addend has no rows before `from`.
template <class T>
struct Product {
    int rows, depth, columns;
    Left left;
    const T* right;
    unsigned right_ld;
    bool right_along;
    T factor;
    T* out;
    unsigned ld;
    T alpha, beta;
    const T* addend;
    unsigned addend_ld;
    int from;
    bool divided;
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

    // rows x l, both sides by rows, nothing added.
    SSVDO_HD Product<T> product(int rows, int depth, Left left, const T* right, T* out) const {
        const unsigned l = g.l;
        return {rows, depth, g.l, left, right, l, false, T(1), out, l, T(1), T(0), nullptr, 0, 0, false};
    }
    SSVDO_HD static void add(Product<T>& p, T alpha, const T* addend, T beta, unsigned ld, int from) {
        p.alpha = alpha, p.addend = addend, p.beta = beta, p.addend_ld = ld, p.from = from;
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

    SSVDO_HD int projection() const { return g.passes * (g.null ? 6 : 4); }
    // Product `step` of projection(): P (z factor), its last `rows` into the last rows of Z; z: the last `first` rows, those
    // above are 0. A^T z, N^T z, V^T, V, z - A, - N; those with N left out where it is.
    SSVDO_HD Product<T> project(int step, const T* z, unsigned ld, int first, T factor, int rows) const {
        const int turn = step / (g.null ? 6 : 4), count = turn + 1 == g.passes ? rows : g.large;
        if (turn > 0) z = Z(), ld = g.l, first = g.large, factor = T(1);
        const int both = first < count ? first : count;
        T* to = last(Z(), count, g.l);
        step %= g.null ? 6 : 4;
        if (step > 0 && !g.null) step++;
        Product<T> p = product(g.d, g.d, basis(step == 2), step == 2 ? small() : other(), step == 2 ? other() : small());
        if (step < 2) {
            p = step ? product(g.null, first, rest(g.large - first, true), z, null())
                     : product(g.d, first, tall(g.large - first, true), z, small());
            p.right_ld = ld, p.factor = factor;
        } else if (step == 2) {
            p.divided = true;
        } else if (step == 4) {
            p = product(count, g.d, tall(g.large - count, false), small(), to);
            add(p, T(-1), z + unsigned(first - both) * ld, factor, ld, count - both);
        } else if (step == 5) {
            p = product(count, g.null, rest(g.large - count, false), null(), to);
            add(p, T(-1), to, T(1), g.l, 0);
        }
        return p;
    }
};

template <class T>
struct OuterForward : OuterLayer<T> {
    using OuterLayer<T>::OuterLayer;
    using OuterLayer<T>::g;

    SSVDO_HD int factored() const { return this->projection() + 1; }
    SSVDO_HD T* gram() const { return this->squares(); }
    SSVDO_HD T* change() const { return gram() + g.l * g.l; }  // sqrt(tau) X - I
    SSVDO_HD int steps() const { return this->projection() + (g.turned[this->layer] ? 3 : 2); }
    SSVDO_HD Product<T> step(int i) const {
        if (i < this->projection()) return this->project(i, g.outer[this->layer], g.l, g.c, g.scale, g.large);
        i -= this->projection();
        if (i == 0) return this->product(g.l, g.large, this->own(this->Z(), g.l, true), this->Z(), gram());
        T* F = g.F[this->layer];
        auto p = this->product(g.large, g.l, this->own(this->Z(), g.l, false), g.X[this->layer], F);
        p.ld = g.F_ld;
        if (i == 1) return p;
        p.left = this->turned(0, false), p.right = change();
        this->add(p, T(1), F, T(1), g.F_ld, 0);
        return p;
    }
    template <class Work>
    SSVDO_HD void before(int, Work&) const {}
};

// X = R^-T of R R^T = gram + tau I, and sqrt(tau) X - I, between the forward's gram and what needs X; a team a layer.
template <class T>
struct FactorKernel {
    static constexpr int min_blocks = 1;
    struct Nobody {
        static constexpr int size = lanes;
    };
    OuterGroup<T> g;
    int count() const { return 1; }
    size_t shared() const { return Sums<typename OwnKind<T>::type, 64, Nobody>::shared; }
    template <class Team>
    SSVDO_HD void operator()(const Team& team, int, int layer, unsigned char* memory) const {
        const OuterForward<T> plan(g, layer);
        const int l = g.l, square = l * l;
        T *gram = plan.gram(), *change = plan.change(), *X = g.X[layer];
        for (int i = team.rank; i < l; i += team.size) gram[i * (l + 1)] += g.tau;
        team.sync();
        const int info = inverse_factor(team, memory, gram, change, X, l);
        if (team.rank == 0) g.info[layer] = info;
        const T least = root(g.tau);
        for (int e = team.rank; e < square; e += team.size) {
            if (info) X[e] = T(NAN);  // nothing like a result
            change[e] = least * X[e] - (e / l == e % l ? T(1) : T(0));
        }
    }
};

template <class T>
struct OuterBackward : OuterLayer<T> {
    using OuterLayer<T>::OuterLayer;
    using OuterLayer<T>::g;

    SSVDO_HD T* dX() const { return this->squares(); }  // and, when that has been used, H
    SSVDO_HD T* lower() const { return dX() + g.l * g.l; }  // of dX^T X; then H X^T
    SSVDO_HD T* change() const { return lower() + g.l * g.l; }
    // dX = L^T E + sqrt(tau) U^T dF, dX^T X, H X^T, dL = E X^T + F H X^T - U (sqrt(tau) X - I) H X^T; those with U left out
    // where it is.
    SSVDO_HD int steps() const { return this->projection() + (g.turned[this->layer] ? 8 : 5); }
    SSVDO_HD int factored() const { return steps(); }
    SSVDO_HD Product<T> step(int i) const {
        const int layer = this->layer, l = g.l;
        const T unit = this->unit(), back = g.scale / unit;
        T *E = this->last(this->Z(), g.c, l), *d_outer = g.d_outer[layer], *X = g.X[layer];
        if (i < this->projection()) return this->project(i, g.dF[layer], g.dF_ld, g.large, unit, g.c);
        i -= this->projection();
        if (i > 0 && !g.turned[layer]) i++;
        auto p = this->product(l, g.c, this->own(g.outer[layer], l, true), E, dX());
        p.alpha = g.scale;
        if (i == 0) return p;
        if (i == 1) {
            p = this->product(l, g.large, this->turned(0, true), g.dF[layer], dX());
            p.right_ld = g.dF_ld, p.factor = unit;
            this->add(p, root(g.tau), dX(), T(1), l, 0);
        } else if (i == 2) {
            p = this->product(l, l, this->own(dX(), l, true), X, lower());
        } else if (i == 3) {
            p = this->product(l, l, this->own(dX(), l, false), X, lower());
            p.right_along = true;
        } else if (i == 4) {
            p = this->product(g.c, l, this->own(E, l, false), X, d_outer);
            p.right_along = true, p.alpha = back;
        } else if (i == 5) {
            p = this->product(g.c, l, this->own(this->last(g.F[layer], g.c, g.F_ld), g.F_ld, false), lower(), d_outer);
            this->add(p, back, d_outer, T(1), l, 0);
        } else if (i == 6) {
            p = this->product(l, l, this->own(change(), l, false), lower(), this->small());
        } else {
            p = this->product(g.c, l, this->turned(g.large - g.c, false), this->small(), d_outer);
            this->add(p, -back, d_outer, T(1), l, 0);
        }
        return p;
    }
    // What is no product, before step i.
    template <class Work>
    SSVDO_HD void before(int i, Work& work) const {
        if (i != this->projection() + (g.turned[this->layer] ? 3 : 2)) return;
        const T *X = g.X[this->layer], least = root(g.tau);
        const int l = g.l;
        work.elements(ptrdiff_t(l) * l, [&](ptrdiff_t e) {
            const ptrdiff_t i = e / l, j = e % l;
            dX()[e] = -lower()[i > j ? e : j * l + i];  // H
            change()[e] = least * X[e] - (i == j ? T(1) : T(0));
        });
    }
};

template <class T, template <class> class Plan>
struct OuterKernel {
    static constexpr int M = 128, N = 64, ld = N + 4, min_blocks = sizeof(T) == 4 ? 2 : 1;
    struct Nobody {
        static constexpr int size = lanes;
    };
    template <class Kind>
    static constexpr size_t tile_shared = Sums<Kind, M, Nobody>::shared > M * ld * sizeof(T) ? Sums<Kind, M, Nobody>::shared
                                                                                             : M * ld * sizeof(T);
    OuterGroup<T> g;
    int second;  // the steps before those that want the factor, 0, or from there on, 1
    int blocks;  // that share a layer
    int most() const { return max_blocks; }
    int count() const { return blocks; }
    size_t tiles() const {
        const bool brain = g.tall_type == Stored::bfloat16 || g.basis_type == Stored::bfloat16;
        return sizeof(T) == 8 ? tile_shared<Twice> : brain ? tile_shared<Brain> : tile_shared<Tensor32<false>>;
    }
    size_t shared() const { return sizeof(Task) + tiles(); }

    template <class Team>
    struct Work {
        const OuterKernel& kernel;
        const Team& team;
        unsigned char* memory;
        int block;
        const int& layer;  // these in shared memory
        unsigned& meetings;
        SSVDO_HD void meet() {
            if (team.rank == 0) meetings++;
            team.sync();
            team.meet(kernel.g.gate + 2 * layer + kernel.second, kernel.blocks, meetings);
        }
        // each(e) for e < count, shared out; then all meet.
        template <class Each>
        SSVDO_HD void elements(ptrdiff_t count, Each each) {
            const ptrdiff_t step = ptrdiff_t(kernel.blocks) * team.size;
SSVDO_ROLLED
            for (ptrdiff_t e = ptrdiff_t(block) * team.size + team.rank; e < count; e += step) each(e);
            meet();
        }
    };

    SSVDO_HD static void finish(const Plan<T>& plan, const Product<T>& p, int m, int n, T sum) {
        T made = p.alpha * sum;
        if (p.addend && m >= p.from) made += p.beta * p.addend[unsigned(m - p.from) * p.addend_ld + n];
        if (p.divided) {
            const T scale = plan.inverse(m);
            made = made * scale * scale;
        }
        p.out[unsigned(m) * p.ld + n] = made;
    }

    // What a team is at, in shared memory: a lane's registers are for its sums. Where there are few tiles, several teams
    // share one: each puts aside in `alone` what it sums over a part of the depth.
    struct alignas(64) Task {
        Product<T> product;
        int layer, step, parts, job, jobs, deep, m0, n0, from, to;
        unsigned meetings;
        T* alone;
        Right<T> right;
        alignas(Matrix<T>) unsigned char left[sizeof(Matrix<T>)];  // a Matrix of what is stored there
        template <class S>
        SSVDO_HD Matrix<S>& left_as() {
            void* place = left;
            return *static_cast<Matrix<S>*>(place);
        }

        SSVDO_HD int across() const { return (product.columns + N - 1) / N; }
        SSVDO_HD int tiles() const { return (product.rows + M - 1) / M * across(); }
        SSVDO_HD ptrdiff_t size() const { return ptrdiff_t(product.rows) * product.columns; }
        SSVDO_HD void begin(const Product<T>& p, int block, int blocks, ptrdiff_t room) {
            product = p, parts = 1, job = block;
            while (tiles() * parts < 2 * blocks && p.depth >= 256 * parts && 2 * parts * size() <= room) parts *= 2;
            jobs = tiles() * parts, deep = (p.depth + 32 * parts - 1) / (32 * parts) * 32;
            right = {Matrix<T>(p.right, p.columns, p.depth, p.right_ld, p.right_along), p.factor, p.right_along};
        }
        template <class S>
        SSVDO_HD void take(T* partial) {
            const Product<T>& p = product;
            const int tile = job / parts, part = job % parts;
            m0 = tile / across() * M, n0 = tile % across() * N;
            from = part * deep, to = from + deep < p.depth ? from + deep : p.depth;
            alone = parts > 1 ? partial + part * size() : nullptr;
            left_as<S>() = Matrix<S>(static_cast<const S*>(p.left.data) + p.left.at, p.rows, p.depth, p.left.ld, p.left.along);
        }
    };

    template <class Kind, class S, class Team>
    SSVDO_HD void tile(const Plan<T>& plan, const Work<Team>& work, Task& task) const {
        const Team team = work.team.again();
        if (team.rank == 0) task.template take<S>(plan.partial());
        team.sync();
        Sums<Kind, M, Team> sums;
        sums.clear();
        sums.add(team, work.memory, task.m0, task.n0, task.from, task.to, task.template left_as<S>(), task.right);
        T* flat = reinterpret_cast<T*>(work.memory);
        sums.store(team, [&](int m, int n, T sum) { flat[m * ld + n] = sum; });
        team.sync();
SSVDO_ROLLED
        for (int e = team.rank; e < M * N; e += team.size) {
            const int m = task.m0 + e / N, n = task.n0 + e % N;
            if (m >= task.product.rows || n >= task.product.columns) continue;
            const T sum = flat[e / N * ld + e % N];
            if (task.alone)
                task.alone[ptrdiff_t(m) * task.product.columns + n] = sum;
            else
                finish(plan, task.product, m, n, sum);
        }
        if (team.rank == 0) task.job += blocks;
        team.sync();
    }

    template <class Team>
    SSVDO_HD void operator()(const Team& team, int block, int layer, unsigned char* memory) const {
        Task& task = *reinterpret_cast<Task*>(memory);
        const Plan<T> plan(g, task.layer);
        if (team.rank == 0) task.layer = layer, task.meetings = 0, task.step = second ? plan.factored() : 0;
        team.sync();
        Work<Team> work{*this, team, memory + sizeof(Task), block, task.layer, task.meetings};
        const Product<T>& p = task.product;
        while (task.step < (second ? plan.steps() : plan.factored())) {
            plan.before(task.step, work);
            team.sync();  // nobody is at the last product any more
            if (team.rank == 0) task.begin(plan.step(task.step), block, blocks, g.room);
            team.sync();
            while (task.job < task.jobs) {
                if constexpr (sizeof(T) == 8)
                    tile<Twice, T>(plan, work, task);
                else if (p.left.type == Stored::bfloat16)
                    tile<Brain, Bfloat16>(plan, work, task);
                else if (p.left.type == Stored::float16)
                    tile<Tensor32<true>, Float16>(plan, work, task);
                else
                    tile<Tensor32<false>, T>(plan, work, task);
            }
            if (team.rank == 0) task.step++;
            work.meet();
            if (task.parts == 1) continue;
            work.elements(task.size(), [&](ptrdiff_t e) {  // the parts, in their order
                const T* partial = plan.partial() + e;
                T sum = *partial;
SSVDO_ROLLED
                for (int part = 1; part < task.parts; part++) sum += partial[part * task.size()];
                finish(plan, p, int(e / p.columns), int(e % p.columns), sum);
            });
        }
    }
};

}  // namespace SSVDO_ISA
}  // namespace ssvdo
