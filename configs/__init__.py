"""Configs, one file per dataset; `default` contains every key. Installed as `diffusion_distillation.configs`."""

import sys

sys.modules.setdefault('configs', sys.modules[__name__])  # configs import each other by this name
