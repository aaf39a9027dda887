"""Low-rank adapters that peft made and those of a student, merged here and fused in diffusers: are the weights the same?

  python -m benchmarks.adapters --workdir=DIR

Needs diffusers, transformers, peft and torch beside this package. A small U-Net with random weights gets adapters of its attention, of
projections and of 3x3 convolutions, with random factors. They are stored under each of the names that `interop/lora.py` reads, and as
`stages/adapters.py` stores a student's. The largest difference of a weight from the one that diffusers fuses is printed for each,
beside the largest change.
"""

import argparse
import pathlib
import sys
from typing import Any

import diffusers
import jax
import numpy as np
import peft
import safetensors.torch
import torch
from diffusers.training_utils import _collate_lora_metadata

from benchmarks.stable_diffusion_round_trip import make
from diffusion_distillation.diffusion.discrete import Discrete
from diffusion_distillation.interop import diffusers as interop
from diffusion_distillation.interop import lora, stable_diffusion
from diffusion_distillation.networks import lora as factors
from diffusion_distillation.stages import adapters

SCALE, ALPHA, RANK, TOLERANCE = 0.7, 8.0, 4, 1e-6
MODULES = ['to_q', 'to_k', 'to_v', 'to_out.0', 'proj_in', 'conv1']
SCHEDULE = Discrete('scaled_linear', 1000, 0.00085, 0.012, steps_offset=1)


def store(pipeline: pathlib.Path, root: pathlib.Path) -> dict[str, pathlib.Path]:
  """Writes files of adapters with the same random factors; returns them by the kind of their names."""
  loaded = diffusers.StableDiffusionPipeline.from_pretrained(pipeline)
  loaded.unet.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=MODULES))
  torch.manual_seed(1)
  for name, value in loaded.unet.named_parameters():
    if 'lora_B' in name:
      value.data = 0.1 * torch.randn_like(value)
  state = peft.get_peft_model_state_dict(loaded.unet)
  loaded.save_lora_weights(
    root / 'peft', unet_lora_layers=state, **_collate_lora_metadata({'unet': loaded.unet})
  )
  older, kohya = {}, {}
  for name, value in state.items():
    module, kind = name.removesuffix('.weight').rsplit('.lora_', 1)
    way = {'A': 'down', 'B': 'up'}[kind]
    if '.attn' in name:
      older[f'unet.{module}.lora.{way}.weight'] = value.contiguous()
    base = f'lora_unet_{module.replace(".", "_")}'
    kohya |= {f'{base}.lora_{way}.weight': value.contiguous(), f'{base}.alpha': torch.tensor(ALPHA)}
  found = {'peft': next((root / 'peft').glob('*.safetensors'))}
  for kind, tensors in (('older diffusers', older), ('kohya', kohya)):
    found[kind] = root / f'{kind.replace(" ", "_")}.safetensors'
    safetensors.torch.save_file(tensors, found[kind])
  return found


def of_student(params: Any, folder: pathlib.Path) -> tuple[pathlib.Path, Any]:
  """Writes the adapters of a student with random factors; returns the file, and the weights with SCALE times its change."""
  modules = f'{factors.ATTENTION}|.*/proj_in|.*/conv1'
  drawn = factors.init(jax.random.key(0), params, RANK, modules)
  up = {name: jax.random.normal(jax.random.key(1), of['up'].shape) for name, of in drawn.items()}
  made = {
    name: {'down': np.asarray(of['down']), 'up': 0.1 * np.asarray(up[name])}
    for name, of in drawn.items()
  }
  folder.mkdir()
  adapters.write(folder, factors.Adapters(made, ALPHA / RANK), params, '')
  return folder / adapters.FILE, factors.merged_on_host(params, made, SCALE * ALPHA / RANK)


def fused(pipeline: pathlib.Path, file: pathlib.Path) -> dict[str, np.ndarray]:
  """The weights of the U-Net after diffusers has fused the adapters in a file."""
  loaded = diffusers.StableDiffusionPipeline.from_pretrained(pipeline)
  loaded.load_lora_weights(file.parent, weight_name=file.name)
  loaded.fuse_lora(lora_scale=SCALE)
  loaded.unload_lora_weights()
  return {name: value.numpy() for name, value in loaded.unet.state_dict().items()}


def main() -> None:
  """Prints a row for each kind of names; the exit code is 1 unless all weights agree."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--workdir', type=pathlib.Path, required=True, help='a directory that is not there yet'
  )
  root = parser.parse_args().workdir.absolute()
  root.mkdir(parents=True)
  make(root / 'pipeline')
  params = stable_diffusion.read_unet(root / 'pipeline' / 'unet', SCHEDULE)[1]()
  before = interop.state_dict(params)
  worst, rows = 0.0, ['| names | largest change | largest difference |\n|---|---|---|']
  student, of = of_student(params, root / 'student')
  files = store(root / 'pipeline', root) | {'a student': student}
  for kind, file in files.items():
    theirs = fused(root / 'pipeline', file)
    ours = interop.state_dict(of if file == student else lora.merged(file, params, SCALE))
    assert ours.keys() == theirs.keys()
    apart, moved = (
      max(float(np.abs(of[name] - theirs[name]).max()) for name in theirs) for of in (ours, before)
    )
    worst = max(worst, apart)
    rows.append(f'| {kind} | {moved:.2f} | {apart:.1e} |')
  print('\n'.join(rows))
  sys.exit(worst > TOLERANCE)


if __name__ == '__main__':
  main()
