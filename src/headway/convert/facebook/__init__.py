"""Format `facebook`: the checkpoints of Gloeckle et al. 2024, in Meta's own Llama layout."""
