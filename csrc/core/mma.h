// Products of one warp on the tensor cores: which numbers a lane holds, in which pieces, and the instruction.
//
// C (16 x 8) += A (16 x depth) B (depth x 8) in words of 4 words' depth a step: with group = lane / 4 and quad = lane % 4,
// a lane's word r of A is at row group + 8 (r % 2), word quad + 4 (r / 2); of B at column group, word quad + 4 r; its
// number e of C at row group + 8 (e / 2), column 2 quad + e % 2 (PTX ISA, matrix fragments). On the host a worker plays
// whole warps, `part` lanes, and gathers the words from there.
//
// A float32 number is the sum of three bfloat16 numbers, of two to 2^-16, and of two tf32 numbers to 2^-22, so that a few
// exact products of pieces make one that errs as float32 does. What the tensor cores add up they cut off rather than round,
// so no sum stays in them for longer than a slice (Ootomo and Yokota, 2022).
#pragma once

#include "number.h"

namespace ssvdo {
namespace SSVDO_ISA {

// A: bfloat16. B: float32, as three of them; a word has two numbers. left_out: how many products, the first of them, may be
// where 2^-16 of B will do.
struct Brain {
    using Word = std::uint32_t;
    using Sum = float;
    static constexpr int numbers = 2, words = 16, left = 4, right = 2, panels = 3, products = 3, left_out = 1;
    static constexpr bool rounds = false;  // whether sums may stay where they are added up
    SSVDO_HD static constexpr int left_term(int) { return 0; }
    SSVDO_HD static constexpr int right_term(int i) { return 2 - i; }  // the smallest at first
    SSVDO_HD static Word piece(Word w, int) { return w; }
    SSVDO_HD static void split(const Bfloat16* x, Word* out) { out[0] = x[0].bits | Word(x[1].bits) << 16; }
    SSVDO_HD static void split(const float* x, Word* out) {
        float rest[2] = {x[0], x[1]};
SSVDO_UNROLL
        for (int term = 0; term < panels; term++) {
            out[term] = brain_pair(rest[0], rest[1]);
            rest[0] -= from_bits(out[term] << 16), rest[1] -= from_bits(out[term] & 0xffff0000u);
        }
    }
    static double dot(Word a, Word b) {
        return double(from_bits(a << 16)) * from_bits(b << 16) +
               double(from_bits(a & 0xffff0000u)) * from_bits(b & 0xffff0000u);
    }
};

// A and B: float32, as two tf32 numbers each; Exact: A is one (float16).
template <bool Exact>
struct Tensor32 {
    using Word = float;
    using Sum = float;
    static constexpr int numbers = 1, words = 16, left = 4, right = 2, panels = 1, products = Exact ? 2 : 3, left_out = 0;
    static constexpr bool rounds = false;
    SSVDO_HD static constexpr int left_term(int i) { return !Exact && i == 0; }
    SSVDO_HD static constexpr int right_term(int i) { return Exact ? i == 0 : i == 1; }
    SSVDO_HD static float piece(float w, int term) {
        const float high = tensor32(w);
        return term ? tensor32(w - high) : high;
    }
    template <class S>
    SSVDO_HD static void split(const S* x, Word* out) { out[0] = value(x[0]); }
    static double dot(float a, float b) { return double(a) * b; }
};

struct Twice {  // float64
    using Word = double;
    using Sum = double;
    static constexpr int numbers = 1, words = 8, left = 2, right = 1, panels = 1, products = 1, left_out = 0;
    static constexpr bool rounds = true;
    SSVDO_HD static constexpr int left_term(int) { return 0; }
    SSVDO_HD static constexpr int right_term(int) { return 0; }
    SSVDO_HD static double piece(double w, int) { return w; }
    SSVDO_HD static void split(const double* x, Word* out) { out[0] = x[0]; }
    static double dot(double a, double b) { return a * b; }
};

template <class T>
struct OwnKind {  // of products of two matrices of the work
    using type = Tensor32<false>;
};
template <>
struct OwnKind<double> {
    using type = Twice;
};

#if defined(__CUDA_ARCH__)
__device__ __forceinline__ void tensor_cores(float* c, const std::uint32_t* a, const std::uint32_t* b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void tensor_cores(float* c, const float* a, const float* b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
          "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}
__device__ __forceinline__ void tensor_cores(double* c, const double* a, const double* b) {
SSVDO_UNROLL
    for (int half = 0; half < 2; half++)
        asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
            : "+d"(c[2 * half]), "+d"(c[2 * half + 1])
            : "d"(a[half]), "d"(b[0]));
}
#endif

// c += a b for the warps of one worker.
template <class Kind, int part>
SSVDO_HD void multiply_add(typename Kind::Sum (*c)[4], const typename Kind::Word (*a)[Kind::left],
                           const typename Kind::Word (*b)[Kind::right]) {
#if defined(__CUDA_ARCH__)
    tensor_cores(c[0], a[0], b[0]);
#else
    for (int first = 0; first < part; first += 32)
        for (int m = 0; m < 16; m++)
            for (int n = 0; n < 8; n++) {
                auto& sum = c[first + m % 8 * 4 + n / 2][m / 8 * 2 + n % 2];
                double exact = sum;
                for (int w = 0; w < 4 * Kind::right; w++)
                    exact += Kind::dot(a[first + m % 8 * 4 + w % 4][m / 8 + w / 4 * 2], b[first + n * 4 + w % 4][w / 4]);
                sum = toward_zero(exact, sum);
            }
#endif
}

}  // namespace SSVDO_ISA
}  // namespace ssvdo
