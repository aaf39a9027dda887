"""The tables of deliberate breaks fit the code: `python -m tests.breaks` can make each of them."""

from tests import breaks


def test_every_break_has_its_text_and_its_test():
  problems = {broken.title: breaks.problem(broken) for broken in breaks.read_all()}
  assert not {title: problem for title, problem in problems.items() if problem}
