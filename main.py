"""Train, distill, measure and sample: flags to one call. See README.md."""

import pathlib
import sys

from absl import app, flags
from ml_collections import config_flags

from configs import default
from diffusion_distillation import cli
from diffusion_distillation.diffusion import times

_CONFIG = config_flags.DEFINE_config_file('config', lock_config=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run; prepare and keys do without.')
_MODE = flags.DEFINE_enum('mode', 'train', list(cli.MODES), 'What to do.')
_STAGE = flags.DEFINE_string('stage', None, 'sample: the stage; by default the last that is there.')
_WEIGHTS = flags.DEFINE_string(
  'weights', 'ema', "sample: the stage's weights: ema, ema_0.99, ..., last."
)
_NUM_SAMPLES = flags.DEFINE_integer('num_samples', 64, 'sample: how many images.', 1)
_SEED = flags.DEFINE_integer('seed', 0, 'sample: of the noise.', 0, 2**31 - 1)
_SAMPLER = flags.DEFINE_string(
  'sampler',
  None,
  "sample: ddim, ancestral, euler, heun, rk4, dpm_solver_2m, multistep_consistency; by default the stage's own.",
)
_GAMMA = flags.DEFINE_float(
  'gamma', None, 'sample, ancestral: variance from small (0) to large (1).', 0, 1
)
_CLIP_X = flags.DEFINE_bool('clip_x', None, 'sample: clip x to [-1, 1] at each step.')
_STEPS = flags.DEFINE_integer('steps', None, 'sample: how many; by default those of the stage.', 1)
_GRID = flags.DEFINE_enum(
  'grid', None, times.GRIDS, "sample: how the steps are spaced; by default as the model's own."
)
_TIMES = flags.DEFINE_list('times', [], 'sample: a grid of times instead of equal steps: 0,0.25,1.')
_CLASSES = flags.DEFINE_list(
  'classes', [], 'sample: classes to draw in turn, by number or name, or none; by default all.'
)
_OUT = flags.DEFINE_string('out', None, 'sample: a .png (a grid) or .npz (the arrays).')
_SOURCE = flags.DEFINE_string(
  'source',
  None,
  'import: google (the released code), workdir (a stage of a run), model (a folder) or edm (NVIDIA).',
)
_STEP = flags.DEFINE_integer('step', None, 'replay: the update to look at.', 0)
_COORDINATOR = flags.DEFINE_string('coordinator', None, 'Of several processes: HOST:PORT of the first.')
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'How many they are.', 1)
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Which one this is, from 0.', 0)
_PEER_TIMEOUT = flags.DEFINE_integer(
  'peer_timeout',
  100,
  'Seconds without a sign of life after which a process is dead, and all others end.',
  1,
)
_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'import: the file, or WORKDIR/STAGE.')


def main(argv: list[str]) -> None:
  """Ends with the exit code of `cli.run`."""
  options = cli.Options(
    mode=_MODE.value,
    config=_CONFIG.value,
    default=default.get_config(),
    workdir=pathlib.Path(_WORKDIR.value).absolute() if _WORKDIR.value else None,
    stage=_STAGE.value,
    weights=_WEIGHTS.value,
    num_samples=_NUM_SAMPLES.value,
    seed=_SEED.value,
    sampler=_SAMPLER.value,
    gamma=_GAMMA.value,
    clip_x=_CLIP_X.value,
    steps=_STEPS.value,
    grid=_GRID.value,
    times=_TIMES.value,
    classes=_CLASSES.value,
    out=pathlib.Path(_OUT.value) if _OUT.value else None,
    source=_SOURCE.value,
    checkpoint=pathlib.Path(_CHECKPOINT.value).absolute() if _CHECKPOINT.value else None,
    step=_STEP.value,
    coordinator=_COORDINATOR.value,
    num_processes=_NUM_PROCESSES.value,
    process_id=_PROCESS_ID.value,
    peer_timeout=_PEER_TIMEOUT.value,
    rest=argv[1:],
  )
  sys.exit(cli.run(options))


if __name__ == '__main__':
  app.run(main, flags_parser=cli.parse_flags)
