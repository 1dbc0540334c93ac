"""The lean executor: one fused decoder block for the llama-like families, same weights."""
