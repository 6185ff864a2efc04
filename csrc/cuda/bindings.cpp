// The device code for Python: on a GPU by its index, or emulated on the host (device < 0).
#include "../bindings.h"

#include <algorithm>
#include <utility>

#include "api.h"

namespace ssvdo {
namespace {

// Addresses of arrays that hold all layers one after the other.
using Stacked = std::vector<std::uintptr_t>;

// Runs `work` with `index` as the current device, and puts back what was current.
template <class Work>
void on_device(int index, Work work) {
#ifdef SSVDO_CUDA
    if (index >= 0) {
        const int before = device::set_device(index);
        try {
            work();
        } catch (...) {
            device::set_device(before);
            throw;
        }
        device::set_device(before);
        return;
    }
#else
    if (index >= 0) refuse("device", index, "-1 (emulated): this build has no CUDA code");
#endif
    work();
}

template <class T, class S>
void run_product(ProductGroup<T> g, const Addresses& layers, std::uintptr_t stream, int device) {
    auto run = emulated::product<T, S>;
#ifdef SSVDO_CUDA
    if (device >= 0) run = device::product<T, S>;
#endif
    for (size_t first = 0; first < layers.size(); first += max_layers) {
        g.count = int(std::min<size_t>(max_layers, layers.size() - first));
        for (int i = 0; i < g.count; i++) {
            const auto& a = layers[first + i];
            g.left[i] = reinterpret_cast<const void*>(a[0]);
            g.right[i] = reinterpret_cast<const T*>(a[1]);
            g.out[i] = reinterpret_cast<T*>(a[2]);
        }
        on_device(device, [&] { run(g, reinterpret_cast<void*>(stream)); });
    }
}

template <class T>
void run_factor(const Stacked& stacked, int l, int count, std::uintptr_t stream, int device) {
    const FactorGroup<T> g{l, count, reinterpret_cast<const T*>(stacked[0]), reinterpret_cast<T*>(stacked[1]),
                           reinterpret_cast<T*>(stacked[2]), reinterpret_cast<int*>(stacked[3])};
    auto run = emulated::factor<T>;
#ifdef SSVDO_CUDA
    if (device >= 0) run = device::factor<T>;
#endif
    on_device(device, [&] { run(g, reinterpret_cast<void*>(stream)); });
}

template <class T>
void run_inner(bool forward, const InnerShape& s, const Addresses& layers, const Stacked& stacked, std::uintptr_t stream,
               int device) {
    const InnerDevice<T>* table = emulated::inner_device<T>();
#ifdef SSVDO_CUDA
    if (device >= 0) table = device::inner_device<T>();
#endif
    for (size_t first = 0; first < layers.size(); first += max_layers) {
        InnerGroup<T> g{};
        g.k = s.k, g.l = s.l, g.q = s.q, g.width = s.width, g.cayley = s.rotation == Rotation::cayley;
        g.count = int(std::min<size_t>(max_layers, layers.size() - first));
        for (int i = 0; i < g.count; i++) {
            const auto& a = layers[first + i];
            g.packed[i] = reinterpret_cast<const T*>(a[0]);
            g.shift[i] = reinterpret_cast<const T*>(a[1]);
            g.singular[i] = reinterpret_cast<const T*>(a[2]);
            g.mixer[i] = reinterpret_cast<T*>(a[3]);
            g.G[i] = reinterpret_cast<T*>(a[4]);
            g.saved[i] = reinterpret_cast<T*>(a[5]);
            g.d_packed[i] = forward ? nullptr : reinterpret_cast<T*>(a[6]);
            g.d_shift[i] = forward ? nullptr : reinterpret_cast<T*>(a[7]);
        }
        g.work = reinterpret_cast<T*>(stacked[0]);
        if (forward) {
            g.norms = reinterpret_cast<T*>(stacked[1]);
            g.gate = reinterpret_cast<unsigned*>(stacked[2]) + first;
            g.info = reinterpret_cast<int*>(stacked[3]) + first;
        }
        on_device(device, [&] { (forward ? table->forward : table->backward)(g, reinterpret_cast<void*>(stream)); });
    }
}

using Lies = std::pair<bool, ptrdiff_t>;  // a Layout, as Python gives it

void product(const std::string& dtype, const std::string& stored, const Addresses& layers, int rows, int inner,
             int columns, Lies left, Lies right, ptrdiff_t ld, std::uintptr_t stream, int device) {
    check(layers, 3);
    at_least("rows", rows, 1);
    at_least("inner", inner, 1);
    at_least("columns", columns, 1);
    at_least("leading dimension of left", left.second, left.first ? inner : rows);
    at_least("leading dimension of right", right.second, right.first ? columns : inner);
    at_least("ld", ld, columns);
    const auto run = [&](auto number, auto storage) {
        using T = decltype(number);
        const Layout a{left.first, left.second}, b{right.first, right.second};
        run_product<T, decltype(storage)>(ProductGroup<T>{rows, inner, columns, 0, a, b, ld, {}, {}, {}}, layers, stream,
                                          device);
    };
    if (dtype == "float32" && stored == "float32")
        run(0.0f, 0.0f);
    else if (dtype == "float32" && stored == "bfloat16")
        run(0.0f, Bfloat16{});
    else if (dtype == "float32" && stored == "float16")
        run(0.0f, Float16{});
    else if (dtype == "float64" && stored == "float64")
        run(0.0, 0.0);
    else
        throw py::value_error("a product of " + stored + " with " + dtype + " has no kernel; allowed: float32, bfloat16 "
                              "or float16 with float32, float64 with float64");
}

void factor(const std::string& dtype, const Stacked& stacked, int l, int count, std::uintptr_t stream, int device) {
    check({stacked}, 4);
    at_least("l", l, 1);
    at_least("count", count, 1);
    if (l > 46340) refuse("l", l, "<= 46340");              // l * l is an int
    if (count > 65535) refuse("count", count, "<= 65535");  // a grid's second dimension
    if (dtype == "float32")
        run_factor<float>(stacked, l, count, stream, device);
    else if (dtype == "float64")
        run_factor<double>(stacked, l, count, stream, device);
    else
        throw py::type_error("dtype=" + dtype + "; allowed: float32, float64");
}

void inner(bool forward, const std::string& dtype, const Addresses& layers, const Stacked& stacked, const InnerShape& s,
           std::uintptr_t stream, int device) {
    if (s.rotation == Rotation::neumann)
        throw py::value_error("rotation='neumann' has no device code; allowed: 'cayley', 'first_order'");
    check(layers, forward ? 6 : 8, s.k == 1 ? 1u | 1u << 6 : 0u);  // packed and its gradient are empty
    check({stacked}, forward ? 4 : 1);
    if (dtype == "float32")
        run_inner<float>(forward, s, layers, stacked, stream, device);
    else if (dtype == "float64")
        run_inner<double>(forward, s, layers, stacked, stream, device);
    else
        throw py::type_error("dtype=" + dtype + "; allowed: float32, float64");
}

}  // namespace

void bind_device(py::module_& m) {
    m.attr("max_blocks") = max_blocks;
    m.attr("max_layers") = max_layers;
#ifdef SSVDO_CUDA
    m.def("device_architectures", &device::architectures, "What the CUDA code was built for; \"\": not built.");
#else
    m.def("device_architectures", [] { return ""; }, "What the CUDA code was built for; \"\": not built.");
#endif
    m.def("device_product", &product, py::call_guard<py::gil_scoped_release>(), py::arg("dtype"), py::arg("stored"),
          py::arg("layers"), py::kw_only(), py::arg("rows"), py::arg("inner"), py::arg("columns"), py::arg("left"),
          py::arg("right"), py::arg("ld"), py::arg("stream"), py::arg("device"),
          "out = left right. One row of addresses a layer: left, right, out; left and right: (by rows?, leading "
          "dimension). device < 0: emulated on the host.");
    m.def("device_factor", &factor, py::call_guard<py::gil_scoped_release>(), py::arg("dtype"), py::arg("stacked"),
          py::kw_only(), py::arg("l"), py::arg("count"), py::arg("stream"), py::arg("device"),
          "Stacked over layers: gram, work, inverse, info. device < 0: emulated on the host.");
    for (bool forward : {true, false}) {
        m.def(
            forward ? "device_inner_forward" : "device_inner_backward",
            [forward](const std::string& dtype, const Addresses& layers, const Stacked& stacked, int k, int l, int q,
                      int width, const std::string& rotation, std::uintptr_t stream, int device) {
                const InnerShape s = inner_shape(k, l, q, width, 1, rotation);
                py::gil_scoped_release release;
                inner(forward, dtype, layers, stacked, s, stream, device);
            },
            py::arg("dtype"), py::arg("layers"), py::arg("stacked"), py::kw_only(), py::arg("k"), py::arg("l"),
            py::arg("q"), py::arg("width"), py::arg("rotation"), py::arg("stream"), py::arg("device"),
            "One row of addresses a layer: packed, shift, singular, mixer, G, saved (backward: and d_packed, d_shift). "
            "Stacked: work, norms, gate, info (backward: work). device < 0: emulated on the host.");
    }
}

}  // namespace ssvdo
