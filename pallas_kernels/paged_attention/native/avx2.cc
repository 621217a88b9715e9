// AVX2 and FMA.
#define ATTEND AttendAvx2
#define MERGE MergeAvx2
#include "attend.inc"
