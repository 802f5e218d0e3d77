"""Projectors that leave fewer tokens than a tower has patches: the dict that names them."""

from models.compressors.projector.base import Compressor
from models.compressors.projector.hicom import HICom
from models.compressors.projector.llava_sp import LLaVASP
from models.compressors.projector.tokenpacker import TokenPacker

PROJECTORS: dict[str, type[Compressor]] = {
    'tokenpacker': TokenPacker,
    'hicom': HICom,
    'llava_sp': LLaVASP,
}
