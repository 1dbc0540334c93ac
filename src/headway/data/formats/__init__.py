"""One file per format in which text lies on disk: how its documents are found, and how one is read again."""
