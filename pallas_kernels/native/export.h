// What the library shows to those who load it; all else is its own.

#pragma once

#define OCTAVO_EXPORT extern "C" __attribute__((visibility("default")))
