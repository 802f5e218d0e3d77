"""Options of XLA's compiler for tests of the last digit."""

import jaxlib.version

# tests/conftest.py trades these emitters for faster compiling, and the order of some sums with them.
EMITTERS = ({'xla_cpu_use_fusion_emitters': True} if jaxlib.version.__version_info__ < (0, 11)
            else {})
