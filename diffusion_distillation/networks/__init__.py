"""Networks, and what they work on: Flax modules, denoisers and spaces."""
