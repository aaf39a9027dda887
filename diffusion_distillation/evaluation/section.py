"""The config section `evaluation`."""

import dataclasses

from diffusion_distillation.config import AT_LEAST_TWO, NOT_NEGATIVE, POSITIVE, SHARE, key
from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.samplers import SAMPLERS
from diffusion_distillation.networks import conditioning


@dataclasses.dataclass(frozen=True)
class EvaluationSection:
  """How stages are evaluated, and sampled from."""

  num_samples: int = key(50_000, 'Number of samples per row of `results.json`.', AT_LEAST_TWO)
  reference: str = key(
    '',
    'File of reference statistics, a .npz of EDM, pytorch-fid, ADM or `--mode=features`, with which samples are compared instead '
    'of the training images. Its features must be those of the extractor.',
    path='disk',
  )
  tolerance: float = key(
    0.0,
    'Relative error at which a row stops drawing samples early. The error after n samples is estimated as '
    '`floor * num_samples / n`, with `reference` from the bias of the floor; 0: every row draws `num_samples`.',
    SHARE,
  )
  batch_size: int = key(512, 'Number of images drawn at a time, over all devices.', POSITIVE)
  seed: int = key(
    1,
    'Seed of the sampling noise, the same for every row. Measurements during training and the quality gate have another seed, derived '
    'from this one, so that the rows are not computed from the samples that weights were selected by.',
    NOT_NEGATIVE,
  )
  inception: str = key(
    '',
    'Weight file of the Inception of the FID (`pt_inception-2015-12-05-*.pth` of pytorch-fid, or its state dict as '
    '.safetensors); if empty, distances are measured in the features of a classifier that is trained on the dataset.',
    path='disk',
  )
  dinov2: str = key(
    '',
    'Weight file of DINOv2 (`dinov2_vitl14_pretrain.pth` of the original code, or the `model.safetensors` of transformers), with '
    'which `fd_dinov2` is measured beside the other metrics; if empty, it is not.',
    path='disk',
  )
  clip: str = key(
    '',
    'Folder of a CLIP model of transformers (such as clip-vit-base-patch16), with which the CLIP score of the samples of a model of '
    'texts is computed, or by `--mode=evaluate` that of `--images`; empty: none, and runs of prompts without images are not measured.',
    path='disk',
  )
  prompts: str = key(
    '',
    'File of prompts, one for each image: .txt with one per line, or .csv or .jsonl with a column `text`, `caption` or `prompt`. '
    'Models of texts draw the first `num_samples` of them; empty: the texts of the dataset.',
    path='disk',
  )
  samplers: tuple[str, ...] = key(
    ('ddim', 'ancestral'),
    'Samplers with which the base model is evaluated.',
    choices=SAMPLERS,
    distinct=True,
  )
  grid: str = key('uniform', "Spacing of the base model's sampling steps in t.", choices=times.GRIDS)
  max_steps: int = key(
    1024, 'Largest number of sampling steps; rows with more steps are left out.', POSITIVE
  )
  gamma: float = key(
    0.0,
    '`ancestral`: interpolates the variance of the noise from its lower bound (0) to its upper bound (1).',
    SHARE,
  )
  labels: str = key(
    'data',
    'Class labels of the samples of a conditional model: in the proportions of the training images, as the reference '
    'has them, or balanced.',
    choices=conditioning.LABELS,
  )
  clip_x: bool = key(True, 'Whether the predicted x is clipped to [-1, 1] at each sampling step.')
  guidance: tuple[float, ...] = key(
    (0.0,),
    'Weights W of classifier-free guidance with which the base model is evaluated, and students that take the weight as an '
    'input if it is in their range; 0: none. Other software often states 1 + W. Weights above 0 need a base that was trained '
    'with `dataset.label_dropout`.',
    NOT_NEGATIVE,
    distinct=True,
  )
  guidance_interval: tuple[float, ...] = key(
    (),
    'Noise levels sigma / alpha, (low, high), between which the sampling steps of the base model are guided; empty: all.',
  )
  guiding_model: str = key(
    '',
    'Folder of a weaker model, or directory of its stage or run, that guides the base model in place of its unconditional '
    'predictions (autoguidance); empty: none.',
    path='disk',
  )
  neighbours: int = key(
    50_000,
    'Number of training images, drawn at random, among which the report looks for those nearest to samples; 0: the report does '
    'not show them.',
    NOT_NEGATIVE,
  )
  neighbours_of: str = key(
    '', 'Stage whose samples the report shows beside the nearest training images; empty: the last stage.'
  )
