// AVX2 and FMA.
#define ATTEND AttendAvx2
#define MERGE MergeAvx2
#define ROTATE RotateAvx2
#include "attend.inc"
#include "rotate.inc"
