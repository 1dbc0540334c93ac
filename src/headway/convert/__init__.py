"""Import and export of checkpoints: one common form, one file per format, tensors read and written one at a time."""
