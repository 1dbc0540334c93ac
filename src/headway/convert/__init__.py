"""Import and export of checkpoints through one common form, one file per format, tensor by tensor."""
