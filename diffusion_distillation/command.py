"""Train, distill, evaluate and sample diffusion models."""

import contextlib
import importlib
import logging
import os
import sys

# The compiler's warning 'Very slow compile?' reads like an error; real errors are raised in Python.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

from absl import app, flags
from ml_collections import config_flags

from diffusion_distillation import arguments, cli
from diffusion_distillation.config import Config
from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.samplers import SAMPLERS
from diffusion_distillation.errors import UserError
from diffusion_distillation.system import checkpoints


def _integer(
  name: str, default: int | None, meaning: str, least: int, most: int | None = None
) -> flags.FlagHolder:
  """Defines a flag for an integer, which may be given as 1e3."""
  parser = arguments.WholeParser(least, most)
  return flags.DEFINE(parser, name, default, meaning, serializer=flags.ArgumentSerializer())


_CONFIG = config_flags.DEFINE_config_file('config', lock_config=True)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Directory of the run; all modes except prepare, compare, features and keys need it.'
)
_WORKDIRS = flags.DEFINE_list(
  'workdirs', [], 'compare: the directories of two or more finished runs, A,B.'
)
_MODE = flags.DEFINE_enum('mode', 'train', list(cli.MODES), 'What to do.')
_STAGE = flags.DEFINE_string(
  'stage', None, 'sample, export: the stage; by default the last one with a checkpoint.'
)
_WEIGHTS = flags.DEFINE_string(
  'weights', 'ema', "sample: the stage's weights: ema, ema_0.99, ..., last, best."
)
_NUM_SAMPLES = _integer(
  'num_samples', None, 'sample: number of images; by default 64, or one for each prompt.', 1
)
_SEED = _integer('seed', 0, 'sample: seed of the noise.', 0, 2**31 - 1)
_SAMPLER = flags.DEFINE_string(
  'sampler',
  None,
  f"sample: one of {', '.join(SAMPLERS)}; by default the stage's own.",
)
_GAMMA = flags.DEFINE_float(
  'gamma', None, 'sample, ancestral: variance of the noise, from small (0) to large (1).', 0, 1
)
_CLIP_X = flags.DEFINE_bool('clip_x', None, 'sample: clip x to [-1, 1] at each step.')
_STEPS = _integer('steps', None, "sample: number of steps; by default the stage's own.", 1)
_GRID = flags.DEFINE_enum(
  'grid', None, times.GRIDS, "sample: spacing of the steps; by default the model's own."
)
_TIMES = flags.DEFINE_list(
  'times', [], 'sample: a grid of times, such as 0,0.25,1, instead of equal steps.'
)
_CLASSES = flags.DEFINE_list(
  'classes', [], 'sample: classes to draw in turn, by number or name, or `none`; by default all.'
)
_PROMPTS = flags.DEFINE_multi_string(
  'prompts',
  [],
  'sample: what to draw, for models that are conditioned on text; given several times, the prompts are drawn in turn.',
)
_NEGATIVE_PROMPT = flags.DEFINE_string(
  'negative_prompt',
  None,
  'sample: what guidance leads away from, for models that are conditioned on text; by default the empty text.',
)
_GUIDANCE = flags.DEFINE_float(
  'guidance',
  None,
  'sample: the weight W of classifier-free guidance, x + W (x - x without a class); 0, the default, is no guidance. Other '
  'software often calls 1 + W the guidance scale.',
)
_GUIDANCE_INTERVAL = flags.DEFINE_list(
  'guidance_interval',
  [],
  'sample: noise levels sigma / alpha, LOW,HIGH, between which steps are guided; by default all.',
)
_GUIDING_MODEL = flags.DEFINE_string(
  'guiding_model',
  None,
  'sample, serve: the folder of a weaker model, or the directory of its stage or run, that guides in place of the predictions without a '
  'class (autoguidance).',
)
_OUT = flags.DEFINE_string(
  'out',
  None,
  'sample: a .png (a grid), a .npz (the arrays), or a folder, FOLDER/ (a .png for each image). export: a new folder. '
  'compare: the folder of the page. evaluate, with --images or the folder of a model: a .json. features: a .npz.',
)
_FORMAT = flags.DEFINE_string(
  'format',
  'jax',
  'export: the format, jax (a program that needs only JAX), diffusers, onnx, or lora (the adapters of a student of texts, one file).',
)
_SOURCE = flags.DEFINE_string(
  'source',
  None,
  'import: where the model comes from: google (the released code), diffusers (a folder that it saved), '
  'stable_diffusion (a folder that diffusers saved), edm (NVIDIA), workdir (a stage of a run) or model (the folder of a finished stage).',
)
_IMAGES = flags.DEFINE_string(
  'images',
  None,
  "evaluate: images from elsewhere to measure instead of a run's stages; features: the images. A folder or .zip of image files, or "
  'an .npz with uint8 images (N, H, W, C).',
)
_INCEPTION = flags.DEFINE_string(
  'inception', None, 'features: the weights of the Inception of the FID, .pth or .safetensors.'
)
_STEP = _integer('step', None, 'replay: the update to look at.', 0)
_PORT = _integer('port', 7860, 'serve: the port on 127.0.0.1; 0 for any free one.', 0, 65535)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'With several processes: HOST:PORT of the first.'
)
_NUM_PROCESSES = _integer('num_processes', None, 'Number of processes; 1: do not look for others.', 1)
_PROCESS_ID = _integer('process_id', None, 'Index of this process, from 0.', 0)
_PEER_TIMEOUT = _integer(
  'peer_timeout',
  100,
  'Seconds without a heartbeat after which a process counts as dead and all others exit.',
  1,
)
_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'import: the file, or WORKDIR/STAGE.')
_LORA = flags.DEFINE_string(
  'lora',
  None,
  'import: a .safetensors file of low-rank adapters of the U-Net, merged into it; for --source=stable_diffusion.',
)
_LORA_SCALE = flags.DEFINE_float('lora_scale', 1.0, 'import: multiplies the changes of --lora.')


def parse_flags(argv: list[str]) -> list[str]:
  """Parses flags as absl does, but reports a bad config or override in one line, with exit code 2."""
  _default()  # declares the keys
  if {'--help', '-help', '--helpfull', '-helpfull'} & set(argv[1:]):
    with contextlib.suppress(BrokenPipeError):
      print(__doc__, flags.FLAGS.module_help(__name__), sep='\n')
    sys.exit(cli.leave_quietly(0))
  try:
    # Only warnings by default; --verbosity=0 shows all messages of orbax and jax.
    prepared = [argv[0], '--verbosity=-1', *arguments.prepare(argv[1:])]
    rest = flags.FLAGS(prepared)
    if (flags.FLAGS['verbosity'].value or 0) < 0:
      checkpoints.silence_background_errors()
      logging.getLogger('matplotlib').setLevel(logging.ERROR)  # warns about an unwritable home
    getattr(flags.FLAGS['config'].value, 'items', None)  # raises if the file could not be loaded
    return rest
  except Exception as error:
    before, traceback, lines = str(error).partition('Traceback')
    text = f'{before} {lines.strip().splitlines()[-1]}' if traceback else before
    with contextlib.suppress(BrokenPipeError):
      print(f'error: {" ".join(text.split())}', file=sys.stderr)
    sys.exit(cli.leave_quietly(UserError.exit_code))


def _default() -> Config:
  found: Config = importlib.import_module(f'{arguments.configs().__name__}.default').get_config()
  return found


def run(argv: list[str]) -> None:
  """Runs the command and exits with the exit code of `cli.run`."""
  options = cli.Options(
    mode=_MODE.value,
    config=_CONFIG.value,
    default=_default(),
    workdir=_WORKDIR.value or None,
    workdirs=_WORKDIRS.value,
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
    prompts=_PROMPTS.value,
    negative_prompt=_NEGATIVE_PROMPT.value,
    guidance=_GUIDANCE.value,
    guidance_interval=_GUIDANCE_INTERVAL.value,
    guiding_model=_GUIDING_MODEL.value or None,
    out=_OUT.value or None,
    format=_FORMAT.value,
    source=_SOURCE.value,
    checkpoint=_CHECKPOINT.value or None,
    lora=_LORA.value or None,
    lora_scale=_LORA_SCALE.value,
    step=_STEP.value,
    port=_PORT.value,
    images=_IMAGES.value or None,
    inception=_INCEPTION.value or None,
    coordinator=_COORDINATOR.value,
    num_processes=_NUM_PROCESSES.value,
    process_id=_PROCESS_ID.value,
    peer_timeout=_PEER_TIMEOUT.value,
    rest=argv[1:],
  )
  sys.exit(cli.run(options))


def _open_streams() -> None:
  """Opens /dev/null for each closed one of stdin, stdout and stderr, so that no other file gets its descriptor."""
  for name in ('stdin', 'stdout', 'stderr'):
    if getattr(sys, name) is None:
      descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor
      setattr(sys, name, os.fdopen(descriptor, 'r' if name == 'stdin' else 'w'))


def main() -> None:
  """Runs the program."""
  _open_streams()
  app.run(run, flags_parser=parse_flags)
