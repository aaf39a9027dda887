"""Train, distill, measure and sample from a clone; the same as the command `diffusion-distillation`. See README.md."""

from diffusion_distillation import command

if __name__ == '__main__':
  command.main()
