"""One file per dataset; `default` has every key. Installed as `diffusion_distillation.configs`."""

import sys

sys.modules.setdefault('configs', sys.modules[__name__])  # the name by which configs import one another
