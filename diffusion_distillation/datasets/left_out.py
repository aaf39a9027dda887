"""Files in a dataset's directory or zip that are not used, counted by reason."""

import dataclasses


@dataclasses.dataclass
class LeftOut:
  """Counts unused files by the reason why they are not used.

  Attributes:
    counts: number of files by reason.
    examples: the alphabetically first file by reason, regardless of the order in which they were found.
  """

  counts: dict[str, int] = dataclasses.field(default_factory=dict)
  examples: dict[str, str] = dataclasses.field(default_factory=dict)

  def add(self, reason: str, example: str) -> None:
    """Counts a file."""
    self.counts[reason] = self.counts.get(reason, 0) + 1
    self.examples[reason] = min(example, self.examples.get(reason, example))

  def lines(self) -> list[str]:
    """Returns one line per reason, the most frequent first: '12 hidden, such as a/.b.png'."""
    most = sorted(self.counts, key=lambda reason: (-self.counts[reason], reason))
    return [
      f'{self.counts[reason]:,} {reason}, such as {shown(self.examples[reason])}' for reason in most
    ]


def shown(name: str) -> str:
  """Escapes characters of a name or message that are not printable, including line breaks."""
  text = name.encode(errors='backslashreplace').decode()
  return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)
