// AVX512.
#define ATTEND AttendAvx512
#include "attend.inc"
