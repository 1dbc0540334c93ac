"""Hidden states, an unembedding and labels -> the multi-token loss."""
