// For any processor.
#define ATTEND AttendPortable
#define MERGE MergePortable
#define ROTATE RotatePortable
#include "attend.inc"
#include "rotate.inc"
