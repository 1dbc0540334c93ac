"""Runs side by side on one page, from what they wrote about themselves; needs no torch."""
