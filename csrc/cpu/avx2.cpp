// x86-64 with AVX2 and FMA. Compiled with -mavx2 -mfma.
#define SSVDO_ISA avx2
#define SSVDO_VECTOR 32
#define SSVDO_ROWS 6
#define SSVDO_COLUMN_VECTORS 2
#include "prepare.h"
