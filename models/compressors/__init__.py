"""Methods with parameters, same protocol as ops/reducers: the one dict that names them."""

from models.compressors.ctm import CTM
from models.compressors.dynamicvit import DynamicViT
from models.compressors.patchmerger import PatchMerger
from models.compressors.sinkhorn import Sinkhorn

COMPRESSORS: dict[str, type] = {
    'dynamicvit': DynamicViT,
    'patchmerger': PatchMerger,
    'sinkhorn': Sinkhorn,
    'ctm': CTM,
}
