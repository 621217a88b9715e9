"""The pure core: block keys, block pool, scheduler and batching. Python and NumPy, no jax."""
