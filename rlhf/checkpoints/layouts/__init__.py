"""How checkpoints lie on disk: each module reads one layout, and writes it."""
