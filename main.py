"""Runs the command `diffusion-distillation` from a clone of the repository; see README.md."""

from diffusion_distillation import command

if __name__ == '__main__':
  command.main()
