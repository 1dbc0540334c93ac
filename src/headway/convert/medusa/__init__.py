"""Formats `medusa` and `medusa-engine`: residual SiLU heads as Medusa and serving engines keep them."""
