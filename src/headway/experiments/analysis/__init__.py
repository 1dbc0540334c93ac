"""What a model says about the next two tokens of a text, drawn over the text."""
