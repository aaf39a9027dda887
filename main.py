"""Train, distill, measure and sample: flags to one call. See README.md."""

import pathlib
import sys

from absl import app, flags
from ml_collections import config_flags

from configs import default
from diffusion_distillation import cli

_CONFIG = config_flags.DEFINE_config_file('config', lock_config=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run.', required=True)
_MODE = flags.DEFINE_enum('mode', 'train', list(cli.MODES), 'What to do.')
_STAGE = flags.DEFINE_string('stage', None, 'sample: the stage; by default the last that is there.')
_NUM_SAMPLES = flags.DEFINE_integer('num_samples', 64, 'sample: how many images.', 1)
_SEED = flags.DEFINE_integer('seed', 0, 'sample: of the noise.', 0, 2**31 - 1)
_OUT = flags.DEFINE_string('out', None, 'sample: a .png (a grid) or .npz (the arrays).')


def main(argv: list[str]) -> None:
  """Ends with the exit code of `cli.run`."""
  options = cli.Options(
    mode=_MODE.value,
    config=_CONFIG.value,
    default=default.get_config(),
    workdir=pathlib.Path(_WORKDIR.value).absolute(),
    stage=_STAGE.value,
    num_samples=_NUM_SAMPLES.value,
    seed=_SEED.value,
    out=pathlib.Path(_OUT.value) if _OUT.value else None,
    rest=argv[1:],
  )
  sys.exit(cli.run(options))


if __name__ == '__main__':
  app.run(main, flags_parser=cli.parse_flags)
