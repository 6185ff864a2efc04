// The compiled core for Python: raw addresses, sizes and strides; checked here, computed in cpu/.
#include "bindings.h"
#include "cpu/hash.h"

using namespace ssvdo;

namespace {

template <class T>
const Host<T>& build(const std::string& name) {
    const Host<T>* found = host<T>(name.empty() ? nullptr : name.c_str());
    if (!found)
        throw py::value_error("build='" + name + "' does not run here; allowed: 'plain' to '" + host_name() + "'");
    return *found;
}

// addresses: packed, shift, singular, G, saved, mixer; backward: d_packed, d_scale; from rows: left, right.
template <class T>
void inner(bool forward, const InnerShape& s, const Addresses& layers, int tokens, long long left_ld, long long right_ld,
           int threads, const std::string& name) {
    const bool rows = tokens >= 0;
    unsigned optional = s.k == 1 ? 1u | 1u << 6 : 0u;  // packed and its gradient are empty
    optional |= rows ? 1u << 5 : 1u << 8 | 1u << 9;    // mixer; left and right
    if (tokens == 0) optional |= 1u << 8 | 1u << 9;
    check(layers, forward ? 6 : 10, forward ? optional & 1u : optional);
    at_least("threads", threads, 1);
    if (rows) {
        if (s.rotation != Rotation::cayley) throw py::value_error("rows are given, which only rotation='cayley' takes");
        at_least("left_ld", left_ld, s.width + s.l + s.q);
        at_least("right_ld", right_ld, s.k);
    }
    std::vector<InnerLayer<T>> list;
    for (const auto& a : layers) {
        InnerLayer<T> one{};
        one.packed = reinterpret_cast<const T*>(a[0]);
        one.shift = reinterpret_cast<const T*>(a[1]);
        one.singular = reinterpret_cast<const T*>(a[2]);
        one.G = reinterpret_cast<T*>(a[3]);
        one.saved = reinterpret_cast<T*>(a[4]);
        one.mixer = reinterpret_cast<T*>(a[5]);
        one.tokens = rows ? tokens : -1;
        if (!forward) {
            one.d_packed = reinterpret_cast<T*>(a[6]);
            one.d_scale = reinterpret_cast<T*>(a[7]);
            one.left = reinterpret_cast<const T*>(a[8]);
            one.right = reinterpret_cast<const T*>(a[9]);
            one.left_ld = left_ld;
            one.right_ld = right_ld;
        }
        list.push_back(one);
    }
    const Host<T>& chosen = build<T>(name);
    py::gil_scoped_release release;
    (forward ? chosen.inner_forward : chosen.inner_backward)(s, list.data(), int(list.size()), threads);
}

// addresses: a, b, out.
template <class T>
void product(const ProductShape& s, const Addresses& layers, int threads, const std::string& name) {
    check(layers, 3);
    at_least("rows", s.rows, 1);
    at_least("inner", s.inner, 1);
    at_least("columns", s.columns, 1);
    at_least("threads", threads, 1);
    if (s.out_row != 1 && s.out_column != 1) refuse("out_row", s.out_row, "1, or out_column=1");
    std::vector<ProductLayer<T>> list;
    for (const auto& a : layers)
        list.push_back({reinterpret_cast<const T*>(a[0]), reinterpret_cast<const T*>(a[1]), reinterpret_cast<T*>(a[2])});
    const Host<T>& chosen = build<T>(name);
    py::gil_scoped_release release;
    chosen.product(s, list.data(), int(list.size()), threads);
}

template <class Single, class Double>
auto by_dtype(const std::string& dtype, Single single, Double twice) {
    if (dtype == "float32") return single();
    if (dtype == "float64") return twice();
    throw py::type_error("dtype=" + dtype + "; allowed: float32, float64");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled core of ssvdo_kernels.";
    m.attr("interface") = interface_version;
#ifdef _OPENMP
    m.attr("openmp") = true;
#else
    m.attr("openmp") = false;
#endif
    m.def("host_name", &host_name, "The instruction set that this processor's build uses.");
    m.def(
        "hash",
        [](const std::vector<std::pair<std::uintptr_t, size_t>>& pieces) {
            std::uint64_t seed = 0;
            for (const auto& [address, bytes] : pieces) {
                if (!address && bytes) refuse("address", 0, "not null");
                seed = hash(reinterpret_cast<const void*>(address), bytes, seed);
            }
            return seed;
        },
        py::arg("pieces"), "One number for the contents of pieces of memory, each (address, bytes).");
    using Strides = std::pair<long long, long long>;
    m.def(
        "product",
        [](const std::string& dtype, const Addresses& layers, int rows, int inner, int columns, Strides a, Strides b,
           Strides out, int threads, const std::string& build) {
            const ProductShape s{rows, inner, columns, a.first, a.second, b.first, b.second, out.first, out.second};
            by_dtype(
                dtype, [&] { product<float>(s, layers, threads, build); },
                [&] { product<double>(s, layers, threads, build); });
        },
        py::arg("dtype"), py::arg("layers"), py::kw_only(), py::arg("rows"), py::arg("inner"), py::arg("columns"),
        py::arg("a"), py::arg("b"), py::arg("out"), py::arg("threads"), py::arg("build") = "",
        "out = a b of each layer: one row of addresses (a, b, out) a layer, strides in elements as (row, column).");
    for (bool forward : {true, false}) {
        m.def(
            forward ? "inner_forward" : "inner_backward",
            [forward](const std::string& dtype, const Addresses& layers, int k, int l, int q, int width,
                      const std::string& rotation, int terms, int tokens, long long left_ld, long long right_ld,
                      int threads, const std::string& build) {
                InnerShape s = inner_shape(k, l, q, width, terms, rotation);
                by_dtype(
                    dtype, [&] { inner<float>(forward, s, layers, tokens, left_ld, right_ld, threads, build); },
                    [&] { inner<double>(forward, s, layers, tokens, left_ld, right_ld, threads, build); });
            },
            py::arg("dtype"), py::arg("layers"), py::kw_only(), py::arg("k"), py::arg("l"), py::arg("q"),
            py::arg("width"), py::arg("rotation"), py::arg("terms"), py::arg("tokens") = -1, py::arg("left_ld") = 0,
            py::arg("right_ld") = 0, py::arg("threads"), py::arg("build") = "",
            "One row of addresses a layer: packed, shift, singular, G, saved, mixer (backward: and d_packed, d_scale, "
            "left, right; with tokens >= 0 left and right stand for the mixer's gradient).");
    }
    bind_device(m);
}
