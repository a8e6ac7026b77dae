"""What happens around training, to be named in a configuration as ``callbacks.<class>``."""

from callbacks.early_stopping import EarlyStopping
from callbacks.evaluation_pictures import EvaluationPictures
from callbacks.export import ExportOnnx
from callbacks.image_logging import ImageLogging
from callbacks.nan_guard import NanGuard
from callbacks.post_training_quantization import PostTrainingQuantization
from callbacks.pruning import ChannelPruning
from callbacks.quantization import QuantizationAwareTraining
from callbacks.requeue import Requeue
from callbacks.sparsity import SparsityRegularization
from callbacks.training_speed import TrainingSpeed
from callbacks.wandb_logger import WandbLogger
from callbacks.wandb_models import WandbModels
from callbacks.weight_averaging import WeightAveraging

__all__ = [
    "ChannelPruning",
    "EarlyStopping",
    "EvaluationPictures",
    "ExportOnnx",
    "ImageLogging",
    "NanGuard",
    "PostTrainingQuantization",
    "QuantizationAwareTraining",
    "Requeue",
    "SparsityRegularization",
    "TrainingSpeed",
    "WandbLogger",
    "WandbModels",
    "WeightAveraging",
]
