"""Methods that let some tokens run a part of a layer, and all of them stay: the one dict of them.

Those with parameters are in models/compressors.
"""

from ops.reducers.branch.cmai import CMAI
from ops.reducers.branch.lemo import LeMo
from ops.reducers.branch.skip_decode import SkipDecode
from ops.reducers.branch.token_sparse_attention import TokenSparseAttention
from ops.reducers.branch.yopo import YOPO

BRANCHES: dict[str, type] = {
    'token_sparse_attention': TokenSparseAttention,
    'skip_decode': SkipDecode,
    'yopo': YOPO,
    'lemo': LeMo,
    'cmai': CMAI,
}
