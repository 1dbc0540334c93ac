"""One file per format on disk: how its documents are found, and how one is read again."""
