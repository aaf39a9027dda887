"""Runs the command `diffusion-distillation` from a clone of the repository; see README.md."""

from diffusion_distillation.__main__ import main

if __name__ == '__main__':
  main()
