// x86-64 with AVX-512 F. Compiled with -mavx512f -mfma.
#define SSVDO_ISA avx512
#define SSVDO_VECTOR 64
#define SSVDO_ROWS 6
#define SSVDO_COLUMN_VECTORS 4
#include "prepare.h"
