"""Records clip_tiny: what a small CLIP of transformers and its image processor answer.

  python -m tests.parity_peers.record_clip    where transformers, torch and Pillow are installed

Writes config.json and preprocessor_config.json as transformers writes them, case.json and io.npz. The weights are functions of
their names, see weights.py.
"""

import json
import pathlib
import zlib

import numpy as np
import torch
import transformers
from PIL import Image

from tests.parity_peers import weights

FOLDER = pathlib.Path(__file__).parent / 'clip_tiny'
SIZES = ((48, 40, 3), (32, 32, 3), (20, 27, 3), (33, 70, 1))  # of the images: H, W, C


def main() -> None:
  """Writes the folder."""
  torch.set_num_threads(1)
  text = {'vocab_size': 557, 'hidden_size': 24, 'intermediate_size': 48, 'num_hidden_layers': 2}
  text |= {'num_attention_heads': 3, 'bos_token_id': 555, 'eos_token_id': 556, 'pad_token_id': 556}
  vision = {'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 4}
  vision |= {'image_size': 32, 'patch_size': 8}
  config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
  config.architectures = ['CLIPModel']
  model = transformers.CLIPModel(config).eval()
  parameters = []
  with torch.no_grad():
    for name, value in model.named_parameters():
      kind = 'positive' if name == 'logit_scale' else weights.kind_of(name, value.ndim)
      kind = 'norm' if name.endswith('class_embedding') else kind
      made = weights.tensor(name, tuple(value.shape) or (1,), kind).reshape(tuple(value.shape))
      value.copy_(torch.from_numpy(made))
      crc = zlib.crc32(made.tobytes())
      parameters.append({'name': name, 'shape': list(value.shape), 'kind': kind, 'crc32': crc})
  processor = transformers.CLIPImageProcessor(size={'shortest_edge': 32}, crop_size=32)
  rng = np.random.default_rng(0)
  arrays = {}
  for k, size in enumerate(SIZES):
    coarse = rng.integers(0, 256, (size[0] // 4 + 1, size[1] // 4 + 1, size[2])).astype(np.uint8)
    pixels = coarse.repeat(4, 0).repeat(4, 1)[: size[0], : size[1]]
    arrays[f'in/image_{k}'] = (pixels // 2 + rng.integers(0, 128, size)).astype(np.uint8)
  images = [Image.fromarray(arrays[f'in/image_{k}'].squeeze()).convert('RGB') for k in range(len(SIZES))]
  values = processor(images, return_tensors='pt')['pixel_values']
  ids = rng.integers(0, 555, (len(SIZES), 77))
  for row, length in zip(ids, (5, 1, 70, 12), strict=True):
    row[0], row[length + 1 :] = 555, 556
  with torch.no_grad():
    tokens = torch.from_numpy(ids)
    found = model(input_ids=tokens, pixel_values=values)
    of_vision = model.vision_model(pixel_values=values)
    flat = model.vision_model(pixel_values=0.003 * values)
  arrays |= {
    'in/input_ids': ids.astype(np.int32),
    'out/pixel_values_nhwc': values.numpy().transpose(0, 2, 3, 1),
    'out/vision_pooled': of_vision.pooler_output.numpy(),
    'out/vision_pooled_flat': flat.pooler_output.numpy(),
    'out/image_embeds': found.image_embeds.numpy(),
    'out/text_embeds': found.text_embeds.numpy(),
  }
  FOLDER.mkdir(exist_ok=True)
  np.savez_compressed(FOLDER / 'io.npz', **arrays)
  config.save_pretrained(FOLDER)
  processor.save_pretrained(FOLDER)
  versions = {module.__name__: module.__version__ for module in (transformers, torch, np)}
  case = {'name': 'clip_tiny', 'class': 'CLIPModel', 'versions': versions, 'sensitivity': {}}
  (FOLDER / 'case.json').write_text(json.dumps(case | {'parameters': parameters}, indent=1) + '\n')


if __name__ == '__main__':
  main()
