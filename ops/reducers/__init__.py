"""Methods without parameters: the one dict that names them.

Tests, the README's table, the command line and the explain tool all read it.
"""

from ops.reducers.vision.ats import ATS
from ops.reducers.vision.dpcknn import DPCKNN
from ops.reducers.vision.evit import EViT
from ops.reducers.vision.kmedoids import KMedoids
from ops.reducers.vision.mctf import MCTF
from ops.reducers.vision.none import Nothing
from ops.reducers.vision.pitome import PiToMe
from ops.reducers.vision.pool import Pool
from ops.reducers.vision.random import Random
from ops.reducers.vision.stride import Stride
from ops.reducers.vision.tome import ToMe
from ops.reducers.vision.tome_kth import ToMeKth
from ops.reducers.vision.topk import TopK

REDUCERS: dict[str, type] = {
    'none': Nothing,
    'random': Random,
    'stride': Stride,
    'pool': Pool,
    'topk': TopK,
    'evit': EViT,
    'tome': ToMe,
    'tome_kth': ToMeKth,
    'pitome': PiToMe,
    'mctf': MCTF,
    'ats': ATS,
    'dpcknn': DPCKNN,
    'kmedoids': KMedoids,
}
