"""The multi-token model: heads as an adapter on an intact Hugging Face causal LM."""
