// For any processor.
#define ATTEND AttendPortable
#include "attend.inc"
