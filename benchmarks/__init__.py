"""Speed and ablations, each a command that prints a table."""
