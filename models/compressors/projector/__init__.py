"""Projectors that leave fewer tokens than a tower has patches: the dict that names them."""

from models.compressors.projector.base import Compressor
from models.compressors.projector.matryoshka import Matryoshka
from models.compressors.projector.mqt import MQT
from models.compressors.projector.quecc import QueCC
from models.compressors.projector.slime import SliME, SliMELocal
from models.compressors.projector.tokenflex import TokenFLEX
from models.compressors.projector.tokenpacker import TokenPacker

PROJECTORS: dict[str, type[Compressor]] = {
    'matryoshka': Matryoshka,
    'mqt': MQT,
    'quecc': QueCC,
    'slime': SliME,
    'slime_local': SliMELocal,
    'tokenflex': TokenFLEX,
    'tokenpacker': TokenPacker,
}
