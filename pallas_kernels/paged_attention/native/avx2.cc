// AVX2 and FMA.
#define ATTEND AttendAvx2
#include "attend.inc"
