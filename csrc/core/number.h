// Storage types of frozen matrices, without any vendor's headers: value(x) is the number as float (or double).
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

SSVDO_HD float value(float x) { return x; }
SSVDO_HD double value(double x) { return x; }
SSVDO_HD float value(Bfloat16 x) { return from_bits(std::uint32_t(x.bits) << 16); }
SSVDO_HD float value(Float16 x) {
    const std::uint32_t sign = std::uint32_t(x.bits & 0x8000) << 16, rest = std::uint32_t(x.bits & 0x7fff) << 13;
    if (rest >= 0x0f800000) return from_bits(sign | 0x70000000 | rest);  // infinite, or not a number
    return from_bits(sign | rest) * 5.192296858534828e33f;  // 2^112: the bias, from 15 to 127; subnormals come along
}

}  // namespace SSVDO_ISA
}  // namespace ssvdo
