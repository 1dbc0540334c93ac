"""The `headway` command line: a thin file per command that loads what it needs when it runs."""
