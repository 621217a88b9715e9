// AVX512.
#define ATTEND AttendAvx512
#define MERGE MergeAvx512
#include "attend.inc"
