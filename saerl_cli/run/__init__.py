"""How a command becomes a run."""
