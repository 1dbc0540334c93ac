"""The main job on the embedded default: train a small byte model, then generate faster, same text."""
