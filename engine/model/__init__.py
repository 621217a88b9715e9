"""The decoder and the sampler: what one step computes on the device."""
