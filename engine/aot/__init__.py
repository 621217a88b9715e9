"""Ahead-of-time compiles for TPUs, on any Linux x86-64 machine: kernels, whole steps, schedules.

`python -m engine.aot` is the command. Nothing here runs on a TPU, so nothing here is a time.
"""
