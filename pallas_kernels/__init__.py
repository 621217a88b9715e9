"""Device kernels, one folder an operation. Imports jax and numpy only, never the engine."""
