import json

from diffusion_distillation.system.logs import MetricsWriter


def lines(tmp_path):
  return [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]


def write(tmp_path, start, steps):
  writer = MetricsWriter(tmp_path, start)
  for step in steps:
    writer.write(step, {'loss': 1.0 / step})
  writer.close()


def test_every_line_has_step_and_values(tmp_path):
  write(tmp_path, 0, [10, 20])
  assert lines(tmp_path) == [{'step': 10, 'loss': 0.1}, {'step': 20, 'loss': 0.05}]
  assert list(tmp_path.glob('events.out.tfevents.*'))


def test_what_lies_beyond_the_restored_step_is_dropped(tmp_path):
  write(tmp_path, 0, [10, 20, 30])
  write(tmp_path, 20, [30, 40])
  assert [line['step'] for line in lines(tmp_path)] == [10, 20, 30, 40]


def test_a_half_written_last_line_is_dropped(tmp_path):
  write(tmp_path, 0, [10, 20])
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 30, "lo')
  write(tmp_path, 30, [40])
  assert [line['step'] for line in lines(tmp_path)] == [10, 20, 40]
