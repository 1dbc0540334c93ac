"""Experiments that run from one command and leave a report: one folder each."""
