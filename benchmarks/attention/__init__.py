"""What attention costs on this device: ours and others', checked before they are timed.

`python -m benchmarks attention --help` shows how to ask; docs/benchmarks/README.md says what the
figures mean. It needs jax and numpy only, so that a bare machine with a GPU can run it, but for
`--engine-step`, which needs what the engine needs.
"""
