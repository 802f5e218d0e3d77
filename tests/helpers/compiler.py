"""Options of XLA's compiler for tests of the last digit."""

import jaxlib.version

# tests/conftest.py gives these emitters up, and the order of their sums, for faster compiling.
EMITTERS = ({'xla_cpu_use_fusion_emitters': True} if jaxlib.version.__version_info__ < (0, 11)
            else {})
