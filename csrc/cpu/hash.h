// A 64-bit hash of memory by which an edit of parameters is noticed; not against an adversary. Eight lanes, so that it runs
// at the memory's speed: each multiplies and mixes every eighth word, and words swapped between lanes or places differ.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace ssvdo {

inline std::uint64_t mixed(std::uint64_t x) {  // splitmix64's finaliser
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

inline std::uint64_t hash(const void* memory, size_t bytes, std::uint64_t seed) {
    constexpr size_t lanes = 8, block = lanes * 8;
    const char* at = static_cast<const char*>(memory);
    std::uint64_t state[lanes];
    for (size_t i = 0; i < lanes; i++) state[i] = mixed(seed + i + 1);
    size_t left = bytes;
    for (; left >= block; left -= block, at += block)
        for (size_t i = 0; i < lanes; i++) {
            std::uint64_t word;
            std::memcpy(&word, at + 8 * i, 8);
            state[i] = (state[i] ^ word) * 0x9e3779b97f4a7c15u;
            state[i] ^= state[i] >> 32;
        }
    for (size_t i = 0; left; i++) {
        std::uint64_t word = 0;
        const size_t part = left < 8 ? left : 8;
        std::memcpy(&word, at, part);
        state[i] = mixed(state[i] ^ word);
        at += part, left -= part;
    }
    std::uint64_t sum = bytes;
    for (std::uint64_t one : state) sum = mixed(sum ^ one);
    return sum;
}

}  // namespace ssvdo
