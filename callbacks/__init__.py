"""What happens around training, to be named in a configuration as ``callbacks.<class>``."""

from callbacks.export import ExportOnnx
from callbacks.image_logging import ImageLogging
from callbacks.pruning import ChannelPruning
from callbacks.quantization import QuantizationAwareTraining

__all__ = ["ChannelPruning", "ExportOnnx", "ImageLogging", "QuantizationAwareTraining"]
