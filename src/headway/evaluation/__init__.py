"""What a trained model is worth: likelihood, acceptance along real text, repetition and decoding speed."""
