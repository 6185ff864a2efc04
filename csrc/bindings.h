// What both files of bindings use: checks that name the argument, its value and what is allowed.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/api.h"

namespace ssvdo {

namespace py = pybind11;

constexpr int interface_version = 2;  // INTERFACE in ops/host.py: raise both where functions or their arguments change

using Addresses = std::vector<std::vector<std::uintptr_t>>;

[[noreturn]] inline void refuse(const std::string& name, long long value, const std::string& allowed) {
    throw py::value_error(name + "=" + std::to_string(value) + " is out of range; allowed: " + allowed);
}

inline void at_least(const char* name, long long value, long long least) {
    if (value < least) refuse(name, value, ">= " + std::to_string(least));
}

inline Rotation rotation_of(const std::string& name) {
    if (name == "cayley") return Rotation::cayley;
    if (name == "neumann") return Rotation::neumann;
    if (name == "first_order") return Rotation::first_order;
    throw py::value_error("rotation='" + name + "' is unknown; allowed: 'cayley', 'neumann', 'first_order'");
}

// Rows of addresses, one a layer: each of `count` non-null unless its bit in `optional` is set.
inline void check(const Addresses& layers, size_t count, unsigned optional = 0) {
    for (size_t i = 0; i < layers.size(); i++) {
        if (layers[i].size() != count) refuse("addresses of layer " + std::to_string(i), (long long)layers[i].size(),
                                              std::to_string(count));
        for (size_t j = 0; j < count; j++)
            if (!layers[i][j] && !(optional >> j & 1))
                refuse("address " + std::to_string(j) + " of layer " + std::to_string(i), 0, "not null");
    }
}

inline InnerShape inner_shape(int k, int l, int q, int width, int terms, const std::string& rotation) {
    at_least("k", k, 1);
    at_least("l", l, 0);
    at_least("width", width, k > l ? k : l);
    at_least("terms", terms, 1);
    at_least("q", q, 0);
    if (q > k) refuse("q", q, "<= k");
    return {k, l, q, width, terms, rotation_of(rotation)};
}

void bind_device(py::module_& m);  // cuda/bindings.cpp

}  // namespace ssvdo
