"""Generating text with several tokens per forward: prompts, cache, masks, loop and statistics."""
