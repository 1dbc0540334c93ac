"""How a model drafts on this machine: acceptance per path, cost per width, the tree that pays most."""
