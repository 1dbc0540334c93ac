"""Format `transformers-mtp`: sequential modules beside their base in one checkpoint."""
