// For any processor.
#define ATTEND AttendPortable
#define MERGE MergePortable
#include "attend.inc"
