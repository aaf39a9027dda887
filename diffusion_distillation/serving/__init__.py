"""A local page on which the finished stages of a workdir draw images."""
