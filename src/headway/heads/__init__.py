"""Head architectures, one file each: hidden states of the trunk -> hidden states per offset."""
