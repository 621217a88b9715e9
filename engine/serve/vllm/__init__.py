"""``vllm.grpc.engine.VllmEngine``: what model gateways, such as SMG, speak to their workers."""
