"""Starts the program: `main.py`, `diffusion-distillation` and `python -m diffusion_distillation`."""

import gc


def main() -> None:
  """Runs the command line of `command.py`."""
  # Imports and tracing create millions of objects and hardly any cycles; by default, Python looks for cycles after every few
  # hundred new objects. Updates create next to none.
  gc.set_threshold(50_000)
  from diffusion_distillation import command

  command.main()


if __name__ == '__main__':
  main()
