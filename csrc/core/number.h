// Storage types of frozen matrices, without any vendor's headers: value(x) is the number as float (or double); and a float's
// rounding to the tensor cores' types.
#pragma once

#include <cstdint>

#include "team.h"

namespace ssvdo {

struct Bfloat16 {
    std::uint16_t bits;
};
struct Float16 {
    std::uint16_t bits;
};

namespace SSVDO_ISA {

SSVDO_HD float from_bits(std::uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}
SSVDO_HD std::uint32_t to_bits(float x) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
}

SSVDO_HD float value(float x) { return x; }
SSVDO_HD double value(double x) { return x; }
SSVDO_HD float value(Bfloat16 x) { return from_bits(std::uint32_t(x.bits) << 16); }
SSVDO_HD float value(Float16 x) {
    const std::uint32_t sign = std::uint32_t(x.bits & 0x8000) << 16, rest = std::uint32_t(x.bits & 0x7fff) << 13;
    if (rest >= 0x0f800000) return from_bits(sign | 0x70000000 | rest);  // infinite, or not a number
    return from_bits(sign | rest) * 5.192296858534828e33f;  // 2^112: the bias, from 15 to 127; subnormals come along
}

// x as bfloat16, to nearest even, in the upper half of a word.
SSVDO_HD std::uint32_t brain(float x) {
    const std::uint32_t bits = to_bits(x);
    return (x == x ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000) & 0xffff0000u;
}
// Two of them: the first in the lower half.
SSVDO_HD std::uint32_t brain_pair(float first, float second) {
#if defined(__CUDA_ARCH__)
    std::uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
#else
    return brain(first) >> 16 | brain(second);
#endif
}

// x as tf32: 10 bits after the leading one, to nearest.
SSVDO_HD float tensor32(float x) {
#if defined(__CUDA_ARCH__)
    std::uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return from_bits(bits);
#else
    return x == x ? from_bits((to_bits(x) + 0x1000) & 0xffffe000u) : x;
#endif
}

// A sum as the tensor cores leave it in their accumulators: float32 cut off, float64 rounded.
inline double toward_zero(double exact, double) { return exact; }
inline float toward_zero(double exact, float) {
    const float nearest = float(exact);
    const bool beyond = exact > 0 ? nearest > exact : nearest < exact;
    return beyond ? from_bits(to_bits(nearest) - 1) : nearest;
}

}  // namespace SSVDO_ISA
}  // namespace ssvdo
