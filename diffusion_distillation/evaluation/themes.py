"""The colours of figures on light and on dark pages."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Theme:
  """The colours of a figure: of text and axes, of what is less important, of the grid, of the page, and of the curves."""

  ink: str
  faint: str
  grid: str
  paper: str
  curves: tuple[str, ...]


LIGHT = Theme(
  *('#111827', '#6b7280', '#e5e7eb', '#ffffff'),
  ('#c2410c', '#1d4ed8', '#15803d', '#7e22ce', '#0e7490', '#a16207', '#be185d', '#4d7c0f'),
)
DARK = Theme(
  *('#e5e7eb', '#9ca3af', '#374151', '#14181f'),
  ('#fb923c', '#60a5fa', '#4ade80', '#c084fc', '#22d3ee', '#facc15', '#f472b6', '#a3e635'),
)
