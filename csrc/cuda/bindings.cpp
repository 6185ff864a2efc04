// The device code for Python: on a GPU by its index, or emulated on the host (device < 0).
#include "../bindings.h"

#include <cmath>

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
void run_outer(bool forward, const OuterShape& s, const Addresses& layers, const Stacked& stacked, int ld,
               std::uintptr_t stream, int device) {
    const OuterDevice<T>* table = emulated::outer_device<T, S>();
#ifdef SSVDO_CUDA
    if (device >= 0) table = device::outer_device<T, S>();
#endif
    for (size_t first = 0; first < layers.size(); first += max_layers) {
        OuterGroup<T> g{};
        g.c = s.c, g.l = s.l, g.r = s.r, g.large = s.large, g.ld = ld, g.rotation = s.rotation;
        g.tau = T(s.tau), g.root_tau = T(std::sqrt(s.tau)), g.scale = T(s.scale);
        g.count = int(std::min<size_t>(max_layers, layers.size() - first));
        for (int i = 0; i < g.count; i++) {
            const auto& a = layers[first + i];
            g.outer[i] = reinterpret_cast<const T*>(a[0]);
            g.reflector[i] = reinterpret_cast<const void*>(a[1]);
            g.basis[i] = reinterpret_cast<const void*>(a[2]);
            g.columns[i] = reinterpret_cast<T*>(a[3]);
            g.inverse[i] = reinterpret_cast<T*>(a[4]);
            g.left[i] = reinterpret_cast<T*>(a[5]);
            g.d_outer[i] = forward ? nullptr : reinterpret_cast<T*>(a[6]);
        }
        const auto at = [&](int index) { return reinterpret_cast<T*>(stacked[index]); };  // scratch: launches take turns
        g.gram = at(0), g.right = at(1);
        if (forward)
            g.info = reinterpret_cast<int*>(stacked[2]) + first;
        else
            g.more = at(2), g.pull = at(3);
        on_device(device, [&] { (forward ? table->forward : table->backward)(g, reinterpret_cast<void*>(stream)); });
    }
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

void outer(bool forward, const std::string& dtype, const std::string& factors, const Addresses& layers,
           const Stacked& stacked, const OuterShape& s, long long ld, std::uintptr_t stream, int device) {
    check(layers, forward ? 6 : 7);
    check({stacked}, forward ? 3 : 4);
    at_least("ld", ld, s.l);
    at_least("r", s.r, 1);
    if (dtype == "float32" && factors == "float32")
        run_outer<float, float>(forward, s, layers, stacked, int(ld), stream, device);
    else if (dtype == "float32" && factors == "bfloat16")
        run_outer<float, Bfloat16>(forward, s, layers, stacked, int(ld), stream, device);
    else if (dtype == "float32" && factors == "float16")
        run_outer<float, Float16>(forward, s, layers, stacked, int(ld), stream, device);
    else if (dtype == "float64" && factors == "float64")
        run_outer<double, double>(forward, s, layers, stacked, int(ld), stream, device);
    else
        throw py::type_error("dtype=" + dtype + " with factors=" + factors +
                             "; allowed: float32 with float32, bfloat16 or float16, float64 with float64");
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
    for (bool forward : {true, false}) {
        m.def(
            forward ? "device_outer_forward" : "device_outer_backward",
            [forward](const std::string& dtype, const std::string& factors, const Addresses& layers,
                      const Stacked& stacked, int c, int l, int r, int large, double tau, double scale, bool rotation,
                      long long ld, std::uintptr_t stream, int device) {
                const OuterShape s = outer_shape(c, l, r, large, tau, scale, rotation);
                py::gil_scoped_release release;
                outer(forward, dtype, factors, layers, stacked, s, ld, stream, device);
            },
            py::arg("dtype"), py::arg("factors"), py::arg("layers"), py::arg("stacked"), py::kw_only(), py::arg("c"),
            py::arg("l"), py::arg("r"), py::arg("large"), py::arg("tau"), py::arg("scale"), py::arg("rotation"),
            py::arg("ld"), py::arg("stream"), py::arg("device"),
            "One row of addresses a layer: outer, reflector, basis, columns, inverse, left (backward: and d_outer). Stacked "
            "over layers: gram, right, info (backward: gram, right, more, pull). device < 0: emulated on the host.");
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
