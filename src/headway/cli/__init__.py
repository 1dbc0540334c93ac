"""The `headway` command line: one thin file per command, each loading what it needs only when it runs."""
