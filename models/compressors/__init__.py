"""Methods with parameters, same protocol as ops/reducers: the one dict that names them."""

from models.compressors.ctm import CTM
from models.compressors.dtem import DTEM
from models.compressors.dtop import DToP
from models.compressors.dynamicvit import DynamicViT
from models.compressors.dyvte import DyVTE
from models.compressors.patchmerger import PatchMerger
from models.compressors.sinkhorn import Sinkhorn
from models.compressors.sit import SiT
from models.compressors.textmonkey_resampler import TextMonkeyResampler
from ops.reducers.method import Method

COMPRESSORS: dict[str, type[Method]] = {
    'dynamicvit': DynamicViT,
    'patchmerger': PatchMerger,
    'sinkhorn': Sinkhorn,
    'ctm': CTM,
    'sit': SiT,
    'dtem': DTEM,
    'dtop': DToP,
    'dyvte': DyVTE,
    'textmonkey_resampler': TextMonkeyResampler,
}
