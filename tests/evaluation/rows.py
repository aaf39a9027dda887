"""Rows of results, as an evaluation writes them, for the tests of what is made of them."""

from diffusion_distillation.diffusion import samplers


def row(stage, sampler, nfe, value, weights='ema'):
  method = {'base': 'denoising'}.get(stage, stage.partition('_')[0])
  num_steps = nfe // samplers.SAMPLERS[sampler].calls_per_step
  extra = {'num_steps': num_steps, 'seconds_per_image': 0.001, 'updates': 10, 'weights': weights}
  return {'stage': stage, 'method': method, 'sampler': sampler, 'nfe': nfe, 'value': value} | extra


ROWS = [
  row('base', 'ddim', 4, 2.0),
  row('base', 'ancestral', 4, 3.0),
  row('base', 'ddim', 2, 20.0),
  row('progressive_0002', 'ddim', 2, 2.5),
]

STUDENTS = [
  row('progressive_0001', 'ddim', 1, 3.0),
  row('knowledge', 'ddim', 1, 6.0),
  row('consistency', 'multistep_consistency', 1, 5.0),
  row('consistency', 'multistep_consistency', 2, 4.0),
  row('dmd', 'ddim', 1, 2.4),
  row('dmd', 'ddim', 1, 0.1, weights='ema_0.99'),
  row('dmd2', 'ddim', 1, 2.2),
]


def results_of(rows, **more):
  """The contents of results.json with these rows."""
  return {
    'rows': rows,
    'metric': 'FD-<b>',
    'floor': {'value': 0.5, 'num_samples': 100},
    'extractor': {'name': 'digits', 'digest': 'ab' * 32, 'task': '<i>', 'held_out_accuracy': 0.99},
    'reference': {'num_images': 7},
    'held_out': {'value': 1.0, 'num_samples': 3},
    'versions': {'jax': '1'},
    'seconds': {'base': 2.0},
    'stages': {'base': {'cost': 0.0}, 'progressive_0002': {'cost': 7.0}},
  } | more


def clip_results_of(rows, **more):
  """The contents of results.json of a run of prompts, whose rows have these values as CLIP scores and nothing else."""
  found = results_of([], metric='CLIP score', metrics={'clip_score': {'better': 'higher'}})
  own = {'metric': 'CLIP score', 'num_samples': 50}
  rows = [row | own | {'metrics': {'clip_score': row['value']}} for row in rows]
  of_texts = {'clip': {'name': 'vit', 'digest': 'ab' * 32}, 'prompts': {'dataset': 'p', 'digest': 'd'}}
  of_images = ('floor', 'held_out', 'extractor', 'reference')
  kept = {key: value for key, value in found.items() if key not in of_images}
  return kept | of_texts | {'dataset': 'p', 'rows': rows} | more
