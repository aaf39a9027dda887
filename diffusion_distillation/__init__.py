"""Diffusion models that need one to eight network calls, by distillation, in JAX."""
