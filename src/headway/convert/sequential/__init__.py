"""Format `transformers-mtp`: sequential modules beside their base in one checkpoint, as transformers and others keep them."""
