"""The scheduler on a stream of requests with a simulated device: what an allocator is worth.

Only the device is made up (`cost`); every decision is that of `engine.core`.
"""
