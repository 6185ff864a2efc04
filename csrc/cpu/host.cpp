// Which of the builds serves this processor.
#include <cstring>

#include "api.h"

#define SSVDO_DECLARE(isa)                   \
    namespace ssvdo {                        \
    namespace isa {                          \
    const Host<float>* single();             \
    const Host<double>* twice();             \
    }                                        \
    }
SSVDO_DECLARE(plain)
#ifdef SSVDO_X86
SSVDO_DECLARE(avx2)
SSVDO_DECLARE(avx512)
#endif

namespace ssvdo {

static const char* best() {
#ifdef SSVDO_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) return "avx512";
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
    return "plain";
}

const char* host_name() {
    static const char* const name = best();
    return name;
}

static int rank_of(const char* name) {
    return !std::strcmp(name, "plain") ? 0 : !std::strcmp(name, "avx2") ? 1 : !std::strcmp(name, "avx512") ? 2 : 3;
}

template <>
const Host<float>* host<float>(const char* name) {
    const int which = rank_of(name ? name : host_name());
    if (which > rank_of(host_name())) return nullptr;
#ifdef SSVDO_X86
    if (which == 2) return avx512::single();
    if (which == 1) return avx2::single();
#endif
    return plain::single();
}

template <>
const Host<double>* host<double>(const char* name) {
    const int which = rank_of(name ? name : host_name());
    if (which > rank_of(host_name())) return nullptr;
#ifdef SSVDO_X86
    if (which == 2) return avx512::twice();
    if (which == 1) return avx2::twice();
#endif
    return plain::twice();
}

}  // namespace ssvdo
