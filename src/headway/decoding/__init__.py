"""Generating text with several tokens per forward: prompts, cache, masks, the loop and what it measured."""
