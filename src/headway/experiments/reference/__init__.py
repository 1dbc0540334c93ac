"""The reference model: where it lies, how a finished run becomes it, what it was measured to do."""
