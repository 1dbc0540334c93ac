"""Measuring how a model drafts on this machine: acceptance per path, cost per width, and the tree that pays most."""
