"""The graph executor: a whole greedy or sampled step on the device, captured as a CUDA graph."""
