"""What is trained, to be named in a configuration as ``lightning_modules.<class>``."""

from lightning_modules.compression import CompressionModule
from lightning_modules.detection import RetinaFaceModule

__all__ = ["CompressionModule", "RetinaFaceModule"]
