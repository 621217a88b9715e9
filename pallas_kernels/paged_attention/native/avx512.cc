// AVX512.
#define ATTEND AttendAvx512
#define MERGE MergeAvx512
#define ROTATE RotateAvx512
#include "attend.inc"
#include "rotate.inc"
