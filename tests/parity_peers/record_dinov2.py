"""Records what transformers' DINOv2 answers for weights by name, with the preprocessing of dgm-eval.

    pip install torch==2.14.1 transformers==5.24.0 pillow==13.0.0 numpy safetensors
    python -m tests.parity_peers.record_dinov2

It writes the folders dinov2_tiny and dinov2_reg4_tiny beside it. The names and shapes of the parameters are those of the
files that transformers writes. Images are resized by Pillow and normalized, as dgm-eval's `Resize`, `ToTensor` and `Normalize`
do. Transformers interpolates position embeddings to a size; the original code without registers, and so this
recording, by a scale factor with an offset of 0.1.
"""

import json
import pathlib
import tempfile
import zlib

import numpy as np
import PIL
import PIL.Image
import safetensors.torch
import torch
import transformers

from tests.parity_peers import weights

ROOT = pathlib.Path(__file__).parent
CONFIG = {
  **{'hidden_size': 128, 'num_hidden_layers': 2, 'num_attention_heads': 2},
  **{'mlp_ratio': 2, 'image_size': 70, 'patch_size': 14},
}
CASES = {
  'dinov2_tiny': ('Dinov2', {}),
  'dinov2_reg4_tiny': ('Dinov2WithRegisters', {'num_register_tokens': 4}),
}


def kind_of(name, ndim):
  if name.endswith(('cls_token', 'register_tokens', 'position_embeddings')):
    return 'embedding'
  return weights.kind_of(name, ndim)


def original_positions(embeddings):
  """How the original code without registers interpolates position embeddings, for images of 224 pixels."""

  def interpolate(tokens, height, width):
    table, dim = embeddings.position_embeddings, embeddings.position_embeddings.shape[-1]
    side = int((table.shape[1] - 1) ** 0.5)
    factors = ((height // 14 + 0.1) / side, (width // 14 + 0.1) / side)
    grid = table[:, 1:].reshape(1, side, side, dim).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, scale_factor=factors, mode='bicubic')
    return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, -1, dim)], dim=1)

  return interpolate


def record(name, prefix, more):
  config = getattr(transformers, f'{prefix}Config')(**CONFIG, **more)
  kind = getattr(transformers, f'{prefix}Model')
  with tempfile.TemporaryDirectory() as folder:
    kind(config).save_pretrained(folder)
    path = pathlib.Path(folder) / 'model.safetensors'
    shapes = {key: value.shape for key, value in safetensors.torch.load_file(path).items()}
    made, entries = {}, []
    for key, shape in shapes.items():
      array = weights.tensor(key, shape, kind_of(key, len(shape)))
      made[key] = torch.from_numpy(array)
      entry = {'name': key, 'shape': list(shape), 'kind': kind_of(key, len(shape))}
      entries.append(entry | {'crc32': zlib.crc32(array.tobytes())})
    safetensors.torch.save_file(made, path, {'format': 'pt'})
    model = kind.from_pretrained(folder).eval()
  if 'num_register_tokens' not in more:
    model.embeddings.interpolate_pos_encoding = original_positions(model.embeddings)
  rng = np.random.Generator(np.random.Philox(key=zlib.crc32(b'dinov2 images')))
  coarse = rng.integers(0, 256, (2, 5, 6, 3), np.uint8)
  images = np.stack(
    [np.asarray(PIL.Image.fromarray(x).resize((36, 24), PIL.Image.NEAREST)) for x in coarse]
  )
  large = [np.asarray(PIL.Image.fromarray(x).resize((224, 224), PIL.Image.BICUBIC)) for x in images]
  inputs = np.stack(large).astype(np.float32) / 255
  inputs = (inputs - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
  with torch.no_grad():
    found = model(torch.from_numpy(inputs.transpose(0, 3, 1, 2)))
  outputs = {'in/images': images, 'out/cls': found.last_hidden_state[:, 0].numpy()}
  outputs |= {'out/resized_crop': np.stack(large)[:, :40, 100:140]}
  (ROOT / name).mkdir(exist_ok=True)
  np.savez_compressed(ROOT / name / 'io.npz', **outputs)
  case = {
    'family': 'dinov2',
    'peer': f'transformers {transformers.__version__}, torch {torch.__version__}, Pillow {PIL.__version__}',
    'class': f'{prefix}Model',
    'name': name,
    'config': CONFIG | more,
    'mode': 'eval, float32',
    'sensitivity': {},
  }
  listed = ',\n'.join('  ' + json.dumps(entry) for entry in entries)
  head = json.dumps(case, indent=1).removesuffix('\n}')
  (ROOT / name / 'case.json').write_text(f'{head},\n "parameters": [\n{listed}\n ]\n}}\n')


if __name__ == '__main__':
  torch.set_num_threads(1)
  for case_name, (case_prefix, case_more) in CASES.items():
    record(case_name, case_prefix, case_more)
