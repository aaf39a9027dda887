"""The kinds of work that benchmarks measure belong to the stages that they name."""

from benchmarks import cases
from benchmarks.cases import Case
from diffusion_distillation.networks import conditioning


def test_work_with_guidance_belongs_to_stages_that_have_it():
  found = {work: Case('tiny', work).stage() for work in cases.WORKS}
  weights = {work: conditioning.weights(stage.denoise.conditioning) for work, stage in found.items()}
  assert [work for work, range_ in weights.items() if range_] == ['guided', 'guided_round']
  assert {work: stage.name for work, stage in found.items() if work.startswith('guided')} == {
    'guided': 'guided',
    'guided_round': found['round'].name,
    'guided_dmd': 'dmd',
  }
  assert (found['guided_dmd'].recipe.method.guidance, found['dmd'].recipe.method.guidance) == (1.0, 0.0)
