"""Formats `medusa` and `medusa-engine`: residual SiLU heads as FasterDecoding/Medusa and serving engines keep them."""
