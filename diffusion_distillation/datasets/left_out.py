"""Files in a dataset's directory or zip that are not used, counted by reason."""

import dataclasses


@dataclasses.dataclass
class LeftOut:
  """Counts unused files by the reason why they are not used.

  Attributes:
    counts: how many.
    examples: the first of them in the alphabet, whatever order they were found in.
  """

  counts: dict[str, int] = dataclasses.field(default_factory=dict)
  examples: dict[str, str] = dataclasses.field(default_factory=dict)

  def add(self, reason: str, example: str) -> None:
    """Counts a file."""
    self.counts[reason] = self.counts.get(reason, 0) + 1
    self.examples[reason] = min(example, self.examples.get(reason, example))

  def lines(self) -> list[str]:
    """One a reason, the most frequent first: '12 hidden, such as a/.b.png'."""
    most = sorted(self.counts, key=lambda reason: (-self.counts[reason], reason))
    return [
      f'{self.counts[reason]:,} {reason}, such as {shown(self.examples[reason])}' for reason in most
    ]


def shown(name: str) -> str:
  """A name or message on one line, in characters that can be printed."""
  text = name.encode(errors='backslashreplace').decode()
  return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)
