"""The format `lora`: the adapters of a student that was trained with LoRA, as one file that diffusers and peft load.

Nothing is drawn to check it: the adapters that are read from it, merged into the weights that they adapt, must be the student's weights.
"""

import os
import pathlib
import shutil

from diffusion_distillation import paths
from diffusion_distillation.errors import StorageError, UserError
from diffusion_distillation.networks import lora
from diffusion_distillation.networks.unet2d_condition import UNet2DCondition
from diffusion_distillation.stages import adapters, model
from diffusion_distillation.stages.model import StoredModel
from diffusion_distillation.system.checkpoints import digest


def export(folder: pathlib.Path, out: str | os.PathLike[str] | None) -> str:
  """Writes the adapters in a model's folder to the file `out`, which does not exist yet; returns a line that says what was written.

  They are only compared with the student's weights if those that they adapt are still beside the model, in the workdir.

  Raises:
    UserError: the model has no adapters of a U-Net of diffusers, or they adapt a student, or `out` cannot be written; nothing was written.
    StorageError: the adapters do not lead to the student's weights; nothing was written.
  """
  into = _check_out(out)
  if not (folder / adapters.FILE).is_file():
    raise UserError(
      f'--format=lora: {folder} holds no adapters, because its model was not trained with lora.rank above 0; --format=diffusers exports '
      'its weights'
    )
  stored = model.read(folder)
  if not isinstance(stored.denoise.network, UNet2DCondition):
    raise UserError(
      f'--format=lora is for the U-Net of Stable Diffusion, and this network is a {type(stored.denoise.network).__name__}; '
      f'{folder / adapters.FILE} has its adapters'
    )
  found, start = adapters.read(folder, stored.params), stored.provenance['start']
  base = folder.parent.parent / start['stage'] / 'model'
  adapted = model.read(base) if (base / model.DESCRIPTION).is_file() else None
  if adapted is None or adapted.digest != start['digest']:
    # The model was moved, perhaps into another run.
    compared = ', which are not beside the model, so that the adapters were not compared with the weights of the student'
  else:
    _check(stored, found, adapted, start['stage'])
    compared = ''
  temporary = into.with_name(f'.{into.name}.tmp')
  try:
    shutil.copyfile(folder / adapters.FILE, temporary)
    os.replace(temporary, into)
  finally:
    temporary.unlink(missing_ok=True)
  count = sum(leaf.size for of in found.factors.values() for leaf in of.values())
  return (
    f'{into}: {count:,} parameters of adapters of {len(found.factors)} modules, scale {found.scale:g}, for the weights of '
    f'{start["stage"]} ({start["digest"][:12]}){compared}'
  )


def _check(stored: StoredModel, found: lora.Adapters, base: StoredModel, name: str) -> None:
  """Raises UserError if the adapted weights are those of a student, and StorageError unless adapters and weights agree."""
  if base.provenance.get('parent'):
    raise UserError(
      f'--format=lora: these adapters change the weights of {name}, which is a student itself; --format=diffusers exports the '
      'weights with all changes'
    )
  merged = lora.merged_on_host(base.params, found.factors, found.scale)
  if digest(merged) != stored.digest:
    raise StorageError(
      f'the adapters and the weights of {name} do not lead to the weights of the model; nothing was written'
    )


def _check_out(out: str | os.PathLike[str] | None) -> pathlib.Path:
  """Returns the file to write; raises UserError unless it is a new .safetensors file in a writable directory."""
  if not out:
    raise UserError('--mode=export --format=lora needs --out, the .safetensors file to write')
  path = paths.on_disk('--out', out).resolve()
  if path.suffix != '.safetensors':
    raise UserError(f'--out={out}: --format=lora writes one file, whose name must end with .safetensors')
  if path.exists():
    raise UserError(f'--out={out} exists already; name a new file')
  if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
    raise UserError(f'--out={out}: {path.parent} is not a writable directory')
  return path
