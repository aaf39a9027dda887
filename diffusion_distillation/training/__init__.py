"""One update, as a pure function: its recipe, state, optimizer and step."""
