"""Baselines: methods that read positions of tokens and nothing else."""

from ops.reducers.baselines.none import Identity
from ops.reducers.baselines.pool import Pool
from ops.reducers.baselines.radial import Radial
from ops.reducers.baselines.random import Random
from ops.reducers.baselines.stride import Stride
from ops.reducers.method import Method

BASELINES: dict[str, type[Method]] = {
    'none': Identity,
    'random': Random,
    'stride': Stride,
    'pool': Pool,
    'radial': Radial,
}
