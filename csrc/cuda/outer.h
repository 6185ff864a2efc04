// The outer part's kernels, a launch each way: the products of plans.h, each shared out among a layer's teams, which meet
// before the next. There is one place that computes products, so that the code of the tiles is there once; which product
// comes next is read from shared memory.
#pragma once

#include "../core/eliminate.h"
#include "plans.h"

namespace ssvdo {
namespace SSVDO_ISA {

template <class T>
struct Right {  // by rows, or by columns (along); times `factor`
    using Stored = T;
    Matrix<T> matrix;
    T factor;
    bool along;
    SSVDO_HD void four(int line, int k, std::uint32_t* out) const { matrix.four(line, k, out); }
    SSVDO_HD T made(T x) const { return x * factor; }
};

// X = R^-T of R R^T = gram + tau I, and sqrt(tau) X - I, between the forward's gram and what needs X; a team a layer.
template <class T>
struct FactorKernel {
    static constexpr int min_blocks = 1;
    OuterGroup<T> g;
    int count() const { return 1; }
    size_t shared() const { return Stages<typename OwnKind<T>::type, 64>::bytes; }
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

template <class T, template <class> class Plan>
struct OuterKernel {
    static constexpr int M = 128, N = 64, ld = N + 4, min_blocks = sizeof(T) == 4 ? 2 : 1;
    template <class Kind>
    static constexpr size_t tile_shared = Stages<Kind, M>::bytes > M * ld * sizeof(T) ? Stages<Kind, M>::bytes
                                                                                      : M * ld * sizeof(T);
    OuterGroup<T> g;
    int second;  // the steps before those that want the factor, 0, or from there on, 1
    int blocks;  // that share a layer
    int most() const { return max_blocks; }
    int count() const { return blocks; }
    size_t tiles() const {
        const auto brain = Stored::bfloat16;
        const bool any = g.tall_type == brain || g.basis_type == brain || g.rest_type == brain;
        return sizeof(T) == 8 ? tile_shared<Twice> : any ? tile_shared<Brain> : tile_shared<Tensor32<false>>;
    }
    size_t shared() const { return sizeof(Task) + tiles(); }

    SSVDO_HD static void finish(const Plan<T>& plan, const Product<T>& p, int m, int n, T sum) {
        T made = p.alpha * sum;
        if (p.addend && m >= p.from) made += p.beta * p.addend[unsigned(m - p.from) * p.addend_ld + n];
        if (p.divided) {
            const T scale = plan.inverse(m);
            made = made * scale * scale;
        }
        p.out[unsigned(m) * p.ld + n] = made;
    }

    // One term of a tile's sums: its operands, and what of its depth this part takes.
    struct Operands {
        Stored type;
        bool coarse;
        int deep, from, to;
        Right<T> right;
        alignas(Matrix<T>) unsigned char left[sizeof(Matrix<T>)];  // a Matrix of what is stored there
        template <class S>
        SSVDO_HD Matrix<S>& left_as() {
            void* place = left;
            return *static_cast<Matrix<S>*>(place);
        }
        template <class S>
        SSVDO_HD void lie(const Left& from, int rows, int depth) {
            left_as<S>() = Matrix<S>(static_cast<const S*>(from.data) + from.at, rows, depth, from.ld, from.along);
        }
    };

    // What a team is at, in shared memory: a lane's registers are for its sums. Jobs are tiles; where these are fewer than
    // teams, parts of their depth (of each term's), and a team's jobs follow one another: of its parts of one tile it makes
    // one sum, and puts it aside in `alone` where others have parts of the same tile.
    struct alignas(64) Task {
        Product<T> product;
        Operands terms[Product<T>::most];
        int layer, step, teams, parts, before, jobs, block, job, next, end, term, m0, n0;  // before: jobs of the last step
        unsigned meetings;
        T* alone;

        SSVDO_HD int across() const { return (product.columns + N - 1) / N; }
        SSVDO_HD int tiles() const { return (product.rows + M - 1) / M * across(); }
        SSVDO_HD ptrdiff_t size() const { return ptrdiff_t(product.rows) * product.columns; }
        // Whether one team made the last product and makes this one: it need not meet the others in between.
        SSVDO_HD bool single() const { return before == 1 && jobs == 1; }
        SSVDO_HD int first(int team) const { return team * jobs / teams; }  // of a team's jobs
        SSVDO_HD int team_of(int job) const { return ((job + 1) * teams - 1) / jobs; }
        // Of a tile's sums the n-th is that of the n-th of its teams.
        SSVDO_HD int begins(int tile) const { return team_of(tile * parts); }
        SSVDO_HD int ends(int tile) const { return team_of(tile * parts + parts - 1); }

        SSVDO_HD void begin(int own, int blocks, ptrdiff_t room) {
            const Product<T>& p = product;
            int depth = 0;
            bool coarse = true;
            for (int t = 0; t < p.count; t++) depth += p.terms[t].depth, coarse = coarse && p.terms[t].coarse;
            share(depth, blocks, room / size(), coarse);
            before = jobs, jobs = tiles() * parts, block = own;
            job = own < teams ? first(own) : jobs, end = own < teams ? first(own + 1) : jobs;
SSVDO_ROLLED
            for (int t = 0; t < p.count; t++) {
                const Term<T>& term = p.terms[t];
                Operands& own = terms[t];
                own.type = term.left.type, own.coarse = term.coarse;
                own.deep = (term.depth + 32 * parts - 1) / (32 * parts) * 32;
                own.right = {Matrix<T>(term.right, p.columns, term.depth, term.ld, term.along), term.factor, term.along};
                if (own.type == Stored::work)
                    own.template lie<T>(term.left, p.rows, term.depth);
                else if (own.type == Stored::bfloat16)
                    own.template lie<Bfloat16>(term.left, p.rows, term.depth);
                else
                    own.template lie<Float16>(term.left, p.rows, term.depth);
            }
        }
        // How many teams, and of how many parts. A team puts aside up to two sums, which takes as long as 512 of the depth
        // (64 KiB of a bfloat16 operand, and as much to read them); a coarse product waits for its operands, not for the
        // tensor cores, while five of eight teams have a tile. There is room for `sums` of each tile.
        SSVDO_HD void share(int depth, int blocks, ptrdiff_t sums, bool coarse) {
            teams = blocks, parts = 1;
            const ptrdiff_t most = ptrdiff_t(tiles()) * (sums - 1 < depth / 64 ? sums - 1 : depth / 64);
            const int many = most < blocks ? int(most) : blocks;
            if (8 * tiles() >= (coarse ? 5 : 8) * many || depth - ptrdiff_t(depth) * tiles() / many <= 512) return;
            teams = many, parts = many < depth / 32 ? many : depth / 32;
        }
        SSVDO_HD void take(T* partial) {
            const int tile = job / parts, from = job % parts, left = parts - from;
            const int count = end - job < left ? end - job : left;
            m0 = tile / across() * M, n0 = tile % across() * N, term = 0, next = job + count;
            alone = count < parts ? partial + (block - begins(tile)) * size() : nullptr;
SSVDO_ROLLED
            for (int t = 0; t < product.count; t++) {
                Operands& own = terms[t];
                const int depth = product.terms[t].depth, to = (from + count) * own.deep;
                own.from = from * own.deep, own.to = to < depth ? to : depth;
            }
        }
    };

    template <class Team>
    struct Work {
        const OuterKernel& kernel;
        const Team& team;
        unsigned char* memory;
        Task& task;
        SSVDO_HD void meet() {
            if (team.rank == 0) task.meetings++;
            team.sync();
            team.meet(kernel.g.gate + 2 * task.layer + kernel.second, kernel.blocks, task.meetings);
        }
        // each(e) for e < count, shared out, or by the single team.
        template <class Each>
        SSVDO_HD void elements(ptrdiff_t count, Each each) {
            if (task.single() && task.block != task.team_of(0)) return;
            const int first = task.single() ? 0 : task.block;
            const ptrdiff_t step = ptrdiff_t(task.single() ? 1 : kernel.blocks) * team.size;
SSVDO_ROLLED
            for (ptrdiff_t e = ptrdiff_t(first) * team.size + team.rank; e < count; e += step) each(e);
        }
    };

    template <class Team>
    SSVDO_HD void tile(const Plan<T>& plan, const Work<Team>& work, Task& task) const {
        const Team team = work.team.again();
        if (team.rank == 0) task.take(plan.partial());
        team.sync();
        Sums<T, M, Team> sums;
        sums.clear();
        while (task.term < task.product.count) {
            Operands& own = task.terms[task.term];
            const auto add = [&](auto kind, auto stored) {
                sums.template add<decltype(kind)>(team, work.memory, task.m0, task.n0, own.from, own.to,
                                                  own.template left_as<decltype(stored)>(), own.right, own.coarse);
            };
            if constexpr (sizeof(T) == 8)
                add(Twice(), T());
            else if (own.type == Stored::bfloat16)
                add(Brain(), Bfloat16());
            else if (own.type == Stored::float16)
                add(Tensor32<true>(), Float16());
            else
                add(Tensor32<false>(), T());
            team.sync();  // a term may have nothing for this part, and no barrier
            if (team.rank == 0) task.term++;
            team.sync();
        }
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
        if (team.rank == 0) task.job = task.next;
        team.sync();
    }

    template <class Team>
    SSVDO_HD void operator()(const Team& team, int block, int layer, unsigned char* memory) const {
        Task& task = *reinterpret_cast<Task*>(memory);
        const Plan<T> plan(g, task.layer);
        if (team.rank == 0) task.layer = layer, task.meetings = 0, task.jobs = 0, task.step = second ? plan.factored() : 0;
        team.sync();
        Work<Team> work{*this, team, memory + sizeof(Task), task};
        const Product<T>& p = task.product;
        while (task.step < (second ? plan.steps() : plan.factored())) {
            if (team.rank == 0) plan.step(task.product, task.step), task.begin(block, blocks, g.room);
            team.sync();
            if (task.before > 0 && !task.single()) work.meet();
            if (plan.before(task.step, work)) {
                if (task.single())
                    team.sync();
                else
                    work.meet();
            }
            while (task.job < task.end) tile(plan, work, task);
            if (task.parts > 1) {
                work.meet();
                work.elements(task.size(), [&](ptrdiff_t e) {  // what was put aside, in its order
                    const int m = int(e / p.columns), n = int(e % p.columns), tile = m / M * task.across() + n / N;
                    const int more = task.ends(tile) - task.begins(tile);
                    if (more == 0) return;
                    const T* partial = plan.partial() + e;
                    T sum = *partial;
SSVDO_ROLLED
                    for (int i = 1; i <= more; i++) sum += partial[i * task.size()];
                    finish(plan, p, m, n, sum);
                });
            }
            team.sync();  // nobody is at this product any more
            if (team.rank == 0) task.step++;
            team.sync();
        }
    }
};

}  // namespace SSVDO_ISA
}  // namespace ssvdo
