// Any processor: registers of 16 bytes (SSE2, NEON).
#define SSVDO_ISA plain
#define SSVDO_VECTOR 16
#define SSVDO_ROWS 6
#define SSVDO_COLUMN_VECTORS 2
#include "prepare.h"
