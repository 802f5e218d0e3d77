"""Plans in one import: what else reads configs of reductions finds it here.

`models/plans/` has one file for each part of it.
"""

from models.plans.caches import make_cache_plan
from models.plans.hosts import Host
from models.plans.make import make_plan, scaled_plan
from models.plans.methods import (
    KEYS,
    Settings,
    branch_methods,
    make_method,
    methods,
    reduction_settings,
)

__all__ = ['KEYS', 'Host', 'Settings', 'branch_methods', 'make_cache_plan', 'make_method',
           'make_plan', 'methods', 'reduction_settings', 'scaled_plan']
