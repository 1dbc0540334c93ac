"""What a trained model is worth: likelihood, acceptance along real text, repetition, speed."""
