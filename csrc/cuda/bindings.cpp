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

template <class T>
const Device<T>& kernels([[maybe_unused]] int device) {
#ifdef SSVDO_CUDA
    if (device >= 0) return *device::table<T>();
#endif
    return *emulated::table<T>();
}

// Calls `launch` with groups of at most max_layers, each filled in by fill(group, addresses of a layer, its index there).
template <class Group, class Fill, class Launch>
void in_groups(Group g, const Addresses& layers, int device, Fill fill, Launch launch) {
    for (size_t first = 0; first < layers.size(); first += max_layers) {
        g.count = int(std::min<size_t>(max_layers, layers.size() - first));
        for (int i = 0; i < g.count; i++) fill(g, layers[first + i], i);
        on_device(device, [&] { launch(g, first); });
    }
}

template <class T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Stored stored(const std::string& name, const std::string& work) {
    if (name == work) return Stored::work;
    if (work == "float32" && name == "bfloat16") return Stored::bfloat16;
    if (work == "float32" && name == "float16") return Stored::float16;
    throw py::value_error("a matrix of " + name + " beside " + work + " has no kernel; allowed: float32, bfloat16 or float16 "
                          "with float32, float64 with float64");
}

struct OuterSizes {
    int large, c, d, l, width, null, passes;
    bool by_rows, additive;
    ptrdiff_t tall_ld, basis_ld, F_ld, dF_ld, room;
    double scale, tau, least;
    std::string tall, basis, rest;
};

template <class T>
OuterGroup<T> outer_group(const OuterSizes& s, const std::string& dtype) {
    OuterGroup<T> g{};
    g.large = s.large, g.c = s.c, g.d = s.d, g.l = s.l, g.width = s.width, g.null = s.null, g.passes = s.passes;
    g.tall_type = stored(s.tall, dtype), g.basis_type = stored(s.basis, dtype), g.rest_type = stored(s.rest, dtype);
    g.by_rows = s.by_rows, g.tall_ld = s.tall_ld, g.basis_ld = s.basis_ld, g.F_ld = s.F_ld, g.dF_ld = s.dF_ld;
    g.scale = T(s.scale), g.tau = T(s.tau), g.least = T(s.least), g.room = s.room;
    return g;
}

template <class T>
void run_outer(bool forward, const OuterSizes& s, const std::string& dtype, const Addresses& layers, const Stacked& stacked,
               std::uintptr_t stream, int device) {
    in_groups(
        outer_group<T>(s, dtype), layers, device,
        [&](OuterGroup<T>& g, const auto& a, int i) {
            g.tall[i] = pointer<void>(a[0]), g.basis[i] = pointer<void>(a[1]), g.turned[i] = pointer<void>(a[2]);
            g.rest[i] = pointer<void>(a[3]), g.singular[i] = pointer<T>(a[4]), g.outer[i] = pointer<T>(a[5]);
            g.F[i] = pointer<T>(a[6]), g.X[i] = pointer<T>(a[7]);
            g.dF[i] = forward ? nullptr : pointer<T>(a[8]), g.d_outer[i] = forward ? nullptr : pointer<T>(a[9]);
        },
        [&](OuterGroup<T>& g, size_t first) {
            g.work = pointer<T>(stacked[0]), g.gate = pointer<unsigned>(stacked[1]) + 2 * first;
            g.info = forward ? pointer<int>(stacked[2]) + first : nullptr;
            const Device<T>& own = kernels<T>(device);
            (forward ? own.outer_forward : own.outer_backward)(g, pointer<void>(stream));
        });
}

template <class T>
void run_inner(bool forward, const InnerShape& s, const Addresses& layers, const Stacked& stacked, std::uintptr_t stream,
               int device) {
    InnerGroup<T> sizes{};
    sizes.k = s.k, sizes.l = s.l, sizes.q = s.q, sizes.width = s.width, sizes.cayley = s.rotation == Rotation::cayley;
    in_groups(
        sizes, layers, device,
        [&](InnerGroup<T>& g, const auto& a, int i) {
            g.packed[i] = pointer<T>(a[0]), g.shift[i] = pointer<T>(a[1]), g.singular[i] = pointer<T>(a[2]);
            g.mixer[i] = pointer<T>(a[3]), g.saved[i] = pointer<T>(a[4]);
            g.d_packed[i] = forward ? nullptr : pointer<T>(a[5]), g.d_shift[i] = forward ? nullptr : pointer<T>(a[6]);
        },
        [&](InnerGroup<T>& g, size_t first) {
            g.work = pointer<T>(stacked[0]);
            if (forward) {
                g.norms = pointer<T>(stacked[1]);
                g.gate = pointer<unsigned>(stacked[2]) + first, g.info = pointer<int>(stacked[3]) + first;
            }
            const Device<T>& own = kernels<T>(device);
            (forward ? own.inner_forward : own.inner_backward)(g, pointer<void>(stream));
        });
}

template <class Single, class Double>
void by_dtype(const std::string& dtype, Single single, Double twice) {
    if (dtype == "float32") return single();
    if (dtype == "float64") return twice();
    throw py::type_error("dtype=" + dtype + "; allowed: float32, float64");
}

void check_outer(const OuterSizes& s) {
    at_least("l", s.l, 1);
    if (s.l > 46340) refuse("l", s.l, "<= 46340");  // l * l is an int
    at_least("c", s.c, 1);
    at_least("d", s.d, s.l);
    at_least("large", s.large, s.c);
    at_least("width", s.width, 1);
    at_least("null", s.null, 0);
    at_least("passes", s.passes, 1);
    at_least("room", s.room, 0);
    at_least("tall_ld", s.tall_ld, s.by_rows ? s.d : s.large);
    at_least("basis_ld", s.basis_ld, s.d);
    at_least("F_ld", s.F_ld, s.l);
    at_least("dF_ld", s.dF_ld, s.l);
    for (auto [name, elements] : {std::pair<const char*, ptrdiff_t>{"tall", (s.by_rows ? s.large : s.d) * s.tall_ld},
                                  {"F", s.large * s.F_ld}, {"dF", s.large * s.dF_ld}})
        if (elements >> 32) refuse(std::string("elements of ") + name, elements, "< 2^32");
}

void inner(bool forward, const std::string& dtype, const Addresses& layers, const Stacked& stacked, const InnerShape& s,
           std::uintptr_t stream, int device) {
    if (s.rotation == Rotation::neumann)
        throw py::value_error("rotation='neumann' has no device code; allowed: 'cayley', 'first_order'");
    check(layers, forward ? 5 : 7, s.k == 1 ? 1u | 1u << 5 : 0u);  // packed and its gradient are empty
    check({stacked}, forward ? 4 : 1);
    by_dtype(
        dtype, [&] { run_inner<float>(forward, s, layers, stacked, stream, device); },
        [&] { run_inner<double>(forward, s, layers, stacked, stream, device); });
}

}  // namespace

void bind_device(py::module_& m) {
    m.attr("max_blocks") = max_blocks;
    m.attr("max_layers") = max_layers;
#ifdef SSVDO_CUDA
    m.def("device_architectures", &device::architectures, "What the CUDA code was built for; \"\": not built.");
    m.def(
        "device_capture", [](std::uintptr_t stream) { return device::capture(pointer<void>(stream)); }, py::arg("stream"),
        "The number of the graph's capture that is under way on a stream, which no other has in a process; 0: none.");
#else
    m.def("device_architectures", [] { return ""; }, "What the CUDA code was built for; \"\": not built.");
#endif
    m.def(
        "device_outer_work",
        [](int large, int d, int l, int null) {
            OuterGroup<float> g{};
            g.large = large, g.d = d, g.l = l, g.null = null;
            return outer_work(g);
        },
        py::arg("large"), py::arg("d"), py::arg("l"), py::arg("null"), "Elements of scratch a layer, but for `room`.");
    for (bool forward : {true, false}) {
        m.def(
            forward ? "device_outer_forward" : "device_outer_backward",
            [forward](const std::string& dtype, const Addresses& layers, const Stacked& stacked, int large, int c, int d,
                      int l, int width, int null, int passes, bool by_rows, bool additive, ptrdiff_t tall_ld,
                      ptrdiff_t basis_ld, ptrdiff_t F_ld, ptrdiff_t dF_ld, ptrdiff_t room, double scale, double tau,
                      double least, const std::string& tall, const std::string& basis, const std::string& rest,
                      std::uintptr_t stream, int device) {
                const OuterSizes s{large,    c,    d,     l,    width, null,  passes, by_rows, additive, tall_ld,
                                   basis_ld, F_ld, dF_ld, room, scale, tau,   least,  tall,    basis,    rest};
                check_outer(s);
                check(layers, forward ? 8 : 10, (additive ? 1u << 2 : 0u) | (null ? 0u : 1u << 3));
                check({stacked}, forward ? 3 : 2);
                py::gil_scoped_release release;
                by_dtype(
                    dtype, [&] { run_outer<float>(forward, s, dtype, layers, stacked, stream, device); },
                    [&] { run_outer<double>(forward, s, dtype, layers, stacked, stream, device); });
            },
            py::arg("dtype"), py::arg("layers"), py::arg("stacked"), py::kw_only(), py::arg("large"), py::arg("c"),
            py::arg("d"), py::arg("l"), py::arg("width"), py::arg("null"), py::arg("passes"), py::arg("by_rows"),
            py::arg("additive"), py::arg("tall_ld"), py::arg("basis_ld"), py::arg("F_ld"), py::arg("dF_ld"),
            py::arg("room"), py::arg("scale"), py::arg("tau"), py::arg("least"), py::arg("tall"), py::arg("basis"),
            py::arg("rest"), py::arg("stream"), py::arg("device"),
            "One row of addresses a layer: tall, basis, turned, rest, singular, outer, F, X (backward: and dF, d_outer). "
            "Stacked: work, gate, info (backward: work, gate). tall, basis, rest: dtypes. device < 0: emulated on the host.");
    }
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
            "One row of addresses a layer: packed, shift, singular, mixer, saved (backward: and d_packed, d_shift). "
            "Stacked: work, norms, gate, info (backward: work). device < 0: emulated on the host.");
    }
}

}  // namespace ssvdo
