"""The encoded texts of a run, and the networks that encode them: both are made before the first stage is trained."""

import pathlib

from diffusion_distillation.config import Config
from diffusion_distillation.datasets import ImageSet
from diffusion_distillation.datasets.encoded import Encoded
from diffusion_distillation.datasets.prompts import Captions
from diffusion_distillation.run import companion_training, encoding
from diffusion_distillation.stages import own_companions
from diffusion_distillation.stages import workdir as workdirs


def prepare(config: Config, workdir: pathlib.Path, captions: Captions) -> Encoded:
  """Encodes the texts of a run; trains the networks for this first, if the run trains them itself.

  Raises:
    UserError: the config is not valid or does not match the workdir; see also `companion_training.ensure` and `encoding.ensure`.
    Preempted: a signal was received; the same command continues.
  """
  if isinstance(captions, ImageSet) and own_companions.are_wanted(config):
    workdirs.plan_for(workdir, config)  # raises its errors before anything is written
    companion_training.check_processes(config, workdir)
    with workdirs.lock_workdir(workdir):
      workdirs.claim(workdir, config)
      workdirs.claim_images(workdir, captions)
      companion_training.ensure(config, workdir, captions)
    stage = workdirs.plan_for(workdir, config)[0][0]
  else:
    stage = workdirs.stored_plan(workdir, config)[0]
  found = encoding.of_run(config, workdir, stage, captions)
  assert found is not None
  return found
