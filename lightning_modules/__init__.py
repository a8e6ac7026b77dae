"""What is trained, to be named in a configuration as ``lightning_modules.<class>``."""

from lightning_modules.checkpoint_io import AtomicCheckpointIO
from lightning_modules.compression import CompressionModule
from lightning_modules.detection import RetinaFaceModule

__all__ = ["AtomicCheckpointIO", "CompressionModule", "RetinaFaceModule"]
