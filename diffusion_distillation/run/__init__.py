"""Carrying a plan out: inputs, the training loop, forecasts and monitoring."""
