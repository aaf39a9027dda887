"""A page, local to the machine, on which the finished stages of a workdir draw images."""
