"""Reading other projects' checkpoints."""
