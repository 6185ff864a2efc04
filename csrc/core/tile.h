// One M x 64 tile of a product by a team of 256 lanes, eight warps: operands pass through shared memory in slices of 64
// bytes' depth, two deep. A team smaller than that, on the host, plays several whole warps a worker.
#pragma once

#include <type_traits>

#include "mma.h"

namespace ssvdo {
namespace SSVDO_ISA {

constexpr int lanes = 256;

// Number i among words, and back: halves never lie apart, which would take a register each.
template <class S>
SSVDO_HD S number(const std::uint32_t* words, int i) {
    S x;
    if constexpr (sizeof(S) == 2)
        x.bits = std::uint16_t(words[i / 2] >> i % 2 * 16);
    else
        __builtin_memcpy(&x, words + i * (sizeof(S) / 4), sizeof x);
    return x;
}
template <class S>
SSVDO_HD void pack_four(const S* x, std::uint32_t* words) {
    if constexpr (sizeof(S) == 2) {
        words[0] = x[0].bits | std::uint32_t(x[1].bits) << 16;
        words[1] = x[2].bits | std::uint32_t(x[3].bits) << 16;
    } else {
        __builtin_memcpy(words, x, 4 * sizeof(S));
    }
}

// An operand as lines (A's rows, B's columns) of `depth` numbers: number k of a line at data[line * ld + k] where `along`,
// else at data[k * ld + line]; 0 outside.
template <class S>
struct Matrix {
    using Stored = S;
    const S* data;
    int lines, depth;
    unsigned ld;  // fewer than 2^32 numbers in all
    bool along, aligned;

    SSVDO_HD Matrix(const S* from, int lines, int depth, unsigned ld, bool along)
        : data(from), lines(lines), depth(depth), ld(ld), along(along),
          aligned(ld % 4 == 0 && reinterpret_cast<size_t>(from) % (4 * sizeof(S)) == 0) {}
    // Four next to each other in memory, from (line, k) on. They stay as they come, so that nobody waits for them here.
    SSVDO_HD void four(int line, int k, std::uint32_t* out) const {
        const S* from = data + (along ? unsigned(line) * ld + k : unsigned(k) * ld + line);
        const int left = (along ? line < lines : k < depth) ? along ? depth - k : lines - line : 0;
        if (aligned && left >= 4) {
            __builtin_memcpy(out, __builtin_assume_aligned(from, 4 * sizeof(S) < 16 ? 4 * sizeof(S) : 16), 4 * sizeof(S));
            return;
        }
        S each[4];
SSVDO_UNROLL
        for (int i = 0; i < 4; i++) each[i] = i < left ? from[i] : S();
        pack_four(each, out);
    }
    SSVDO_HD static S made(S x) { return x; }  // of a number that has come
};

// An operand whose numbers are computed: at(line, k), 0 outside. Neighbours are along k where `along_k`.
template <class S, bool along_k, class At>
struct Computed {
    using Stored = S;
    static constexpr bool along = along_k;
    static constexpr int lines = 1 << 30;
    At at;
    SSVDO_HD void four(int line, int k, std::uint32_t* out) const {
        S each[4];
SSVDO_UNROLL
        for (int i = 0; i < 4; i++) each[i] = along ? at(line, k + i) : at(line + i, k);
        pack_four(each, out);
    }
    SSVDO_HD static S made(S x) { return x; }
};
template <class S, bool along, class At>
SSVDO_HD Computed<S, along, At> computed(At at) {
    return {at};
}

// A slice of one operand on its way to shared memory: `Lines` lines of Kind::words words, four words a lane at a time.
template <class Kind, int Lines, int Panels, class Source>
struct Slice {
    using Word = typename Kind::Word;
    using Stored = typename Source::Stored;
    static constexpr int ld = Kind::words + 4;  // no two lines of a fragment's eight in one bank
    static constexpr int size = Panels * Lines * ld, tasks = Lines * Kind::words / 4, each = (tasks + lanes - 1) / lanes;
    static constexpr int four = sizeof(Stored);  // words of four numbers
    std::uint32_t held[each][Kind::numbers * four];

    // Task t: words k .. k + 3 of a line, or word k of four lines.
    SSVDO_HD static void place(bool along, int t, int& line, int& k) {
        constexpr int groups = Kind::words / 4;
        if (along)
            line = t / groups, k = t % groups * 4;
        else
            line = t / (4 * Kind::words) * 16 + t % 4 * 4, k = t / 4 % Kind::words;
    }
    SSVDO_HD void fetch(const Source& from, int lane, int first, int k0) {
SSVDO_UNROLL
        for (int i = 0; i < each; i++) {
            int line, k;
            if (lane + i * lanes >= tasks) break;
            place(from.along, lane + i * lanes, line, k);
SSVDO_UNROLL
            for (int j = 0; j < Kind::numbers; j++)
                from.four(first + line, k0 + k * Kind::numbers + (from.along ? 4 * j : j), held[i] + j * four);
        }
    }
    SSVDO_HD void put(const Source& from, int lane, Word* to) const {
        const bool along = from.along;
SSVDO_UNROLL
        for (int i = 0; i < each; i++) {
            int line, k;
            if (lane + i * lanes >= tasks) break;
            place(along, lane + i * lanes, line, k);
            Word* const at = to + line * ld + k;
            const auto word = [&](int first, int second, Word* place) {
                const Stored pair[2] = {from.made(number<Stored>(held[i], first)),
                                        from.made(number<Stored>(held[i], second))};
                Word words[Panels];
                Kind::split(pair, words);
SSVDO_UNROLL
                for (int p = 0; p < Panels; p++) place[p * Lines * ld] = words[p];
            };
            constexpr int more = Kind::numbers - 1;  // a word's second number is the next one, or below it
SSVDO_UNROLL
            for (int j = 0; along && j < 4; j++) word(j + more * j, j + more * j + more, at + j);
SSVDO_UNROLL
            for (int j = 0; !along && j < 4; j++) word(j, j + 4 * more, at + j * ld);
        }
    }
};

// Slices of both operands in shared memory: M and 64 lines, one slice to multiply and one that comes.
template <class Kind, int M>
struct Stages {
    static constexpr int N = 64, ld = Kind::words + 4, size = (M + Kind::panels * N) * ld;
    static constexpr size_t bytes = 2 * size * sizeof(typename Kind::Word);
};

// One tile's sums, of one product or of several of any kinds, one after the other.
template <class T, int M, class Team>
struct Sums {
    static constexpr int part = lanes / Team::size;
    static constexpr int down = M / 64, across = 4;  // blocks of 16 x 8 a warp, of which four lie below and two beside another
    T sum[down][across][part][4];

    SSVDO_HD void clear() {
        for (int i = 0; i < down * across * part * 4; i++) (&sum[0][0][0][0])[i] = T(0);
    }

    // sum += A(m0 .. m0 + M - 1, from .. to - 1) B(from .. to - 1, n0 .. n0 + 63). memory: of Stages<Kind, M>::bytes.
    // coarse: without the products that Kind can do without then.
    template <class Kind = typename OwnKind<T>::type, class A, class B>
    SSVDO_HD void add(const Team& team, void* memory, const int& m0, const int& n0, int from, const int& to, const A& a,
                      const B& b, const bool& coarse = false) {
        static_assert(std::is_same<typename Kind::Sum, T>::value, "sums of another type");
        using Word = typename Kind::Word;
        using Stage = Stages<Kind, M>;
        constexpr int deep = Kind::words * Kind::numbers;
        Word* shared = static_cast<Word*>(memory);
        Slice<Kind, M, 1, A> left[part];
        Slice<Kind, Stage::N, Kind::panels, B> right[part];
        const auto fetch = [&](int k) {
            const Team own = team.again();
            for (int p = 0; p < part; p++) {
                left[p].fetch(a, own.rank * part + p, m0, k);
                right[p].fetch(b, own.rank * part + p, n0, k);
            }
        };
        const auto put = [&](Word* at) {
            const Team own = team.again();
            for (int p = 0; p < part; p++) {
                left[p].put(a, own.rank * part + p, at);
                right[p].put(b, own.rank * part + p, at + M * Stage::ld);
            }
        };
        if (to <= from) return;
        fetch(from);
        put(shared);  // which nobody reads any more: the last slice of an earlier `add` ended with a barrier
        team.sync();
        for (int k = from, odd = 0; k < to; k += deep, odd ^= 1) {
            const bool more = k + deep < to;
            if (more) fetch(k + deep);
            if (Kind::left_out > 0 && coarse)
                multiply<Kind, Kind::left_out>(team, shared + odd * Stage::size, a.lines - m0);
            else
                multiply<Kind, 0>(team, shared + odd * Stage::size, a.lines - m0);
            if (more) put(shared + (odd ^ 1) * Stage::size);
            team.sync();
        }
    }

    // each(m, n, sum) for this worker's elements, m and n counted from the tile's corner.
    template <class Each>
    SSVDO_HD void store(const Team& team, Each each) const {
        for (int p = 0; p < part; p++) {
            const Place at(team.rank * part + p);
SSVDO_UNROLL
            for (int i = 0; i < down; i++)
SSVDO_UNROLL
                for (int j = 0; j < across; j++)
SSVDO_UNROLL
                    for (int e = 0; e < 4; e++)
                        each(at.m + 16 * i + at.group + e / 2 * 8, at.n + 8 * j + 2 * at.quad + e % 2, sum[i][j][p][e]);
        }
    }

  private:
    struct Place {  // of a lane: its warp's corner, and which it is there
        int m, n, group, quad;
        SSVDO_HD explicit Place(int lane) : m(lane / 64 * (M / 4)), n(lane / 32 % 2 * 32), group(lane % 32 / 4),
                                            quad(lane % 4) {}
    };

    // sum += a slice's product, a step of the depth and eight columns at a time.
    template <class Kind, int first>
    SSVDO_HD void multiply(const Team& whole, const typename Kind::Word* from, int rows) {
        using Word = typename Kind::Word;
        using Stage = Stages<Kind, M>;
        const Team team = whole.again();
        if (Place(team.rank * part).m >= rows) return;  // the tensor cores are the other warps', and the other team's
        constexpr int deep = 4 * Kind::right, ld = Stage::ld;
SSVDO_ROLLED
        for (int k = 0; k < Kind::words; k += deep) {
            Word a[down][part][Kind::left];
            for (int p = 0; p < part; p++) {
                const Place at(team.rank * part + p);
SSVDO_UNROLL
                for (int i = 0; i < down; i++)
SSVDO_UNROLL
                    for (int r = 0; r < Kind::left; r++)
                        a[i][p][r] = from[(at.m + 16 * i + at.group + r % 2 * 8) * ld + k + at.quad + r / 2 * 4];
            }
SSVDO_UNROLL
            for (int j = 0; j < across; j++) {
                T fresh[down][part][4] = {};
SSVDO_UNROLL
                for (int product = first; product < Kind::products; product++) {
                    const int term = Kind::right_term(product), panel = Kind::panels > 1 ? term : 0;
                    Word pieces[part][Kind::left], b[part][Kind::right];
                    for (int p = 0; p < part; p++) {
                        const Place at(team.rank * part + p);
                        const int line = M + panel * Stage::N + at.n + 8 * j + at.group;
SSVDO_UNROLL
                        for (int r = 0; r < Kind::right; r++)
                            b[p][r] = Kind::piece(from[line * ld + k + at.quad + 4 * r], term);
                    }
SSVDO_UNROLL
                    for (int i = 0; i < down; i++) {
                        for (int p = 0; p < part; p++)
SSVDO_UNROLL
                            for (int r = 0; r < Kind::left; r++)
                                pieces[p][r] = Kind::piece(a[i][p][r], Kind::left_term(product));
                        multiply_add<Kind, part>(Kind::rounds ? sum[i][j] : fresh[i], pieces, b);
                    }
                }
                if constexpr (!Kind::rounds)
                    for (int i = 0; i < down; i++)
                        for (int e = 0; e < part * 4; e++) (&sum[i][j][0][0])[e] += (&fresh[i][0][0])[e];
            }
        }
    }
};

}  // namespace SSVDO_ISA
}  // namespace ssvdo
