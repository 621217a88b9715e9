"""The engines that `python -m benchmarks compare` runs beside ours, each in a process of its own.

Start at `protocol` (what is said between the two processes), then `child` (the process as seen from
outside) and `engines` (which there are). `octavo`, `vllm` and `llama_cpp` are the programs that run
inside; those that stand in another virtual environment import nothing of Octavo's engine.
"""
