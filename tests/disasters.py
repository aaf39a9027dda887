"""What the chaos tests share: a finished run cut back to some moment, and what is whole in it."""

import json
import shutil

from diffusion_distillation.stages import provenance
from tests import tiny

LAST = 'progressive_0001'
CONFIG = tiny.config()
PLANNED, _ = tiny.plan()
PLAN = {stage.name: stage for stage in PLANNED}


def cut_back(workdir, stage=LAST, step=5):
  """A stage as it was when the checkpoint of `step` was its newest; step 0: before it began."""
  stage_dir = workdir / stage
  if not step:
    shutil.rmtree(stage_dir, ignore_errors=True)
    return
  for path in (stage_dir / 'checkpoints').iterdir():
    if int(path.name) > step:
      shutil.rmtree(path)
  if not any((stage_dir / 'checkpoints').iterdir()):
    shutil.rmtree(stage_dir)
    return
  shutil.rmtree(stage_dir / 'model')
  found = json.loads((stage_dir / 'stage.json').read_text())
  found = {key: value for key, value in found.items() if key not in ('digest', 'seconds')}
  (stage_dir / 'stage.json').write_text(json.dumps(found | {'finished': False}))


def load(workdir, stage=LAST):
  """A stage's newest whole model, read by this process; None if there is none."""
  return provenance.load_model(workdir, PLAN[stage], CONFIG)


def assert_told(err, *words):
  """No traceback, and a last line that says what is wrong and what to do."""
  assert 'Traceback' not in err, err
  last = err.splitlines()[-1]
  assert last.startswith('error: ') and all(word in last for word in words), err
