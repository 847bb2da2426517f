"""Multi-label image recognition with missing labels on frozen vision-language models: TRM-ML as plug-in modules.

Labels everywhere: 1 present, 0 absent, values between are soft, -1 unknown.
"""

from . import functional, labels, metrics
from .calibration import Calibration
from .chunked import ChunkedTRMObjective
from .contrast import MultimodalContrastiveLoss
from .distillation import RegionDistillationLoss
from .features import write_features
from .global_head import GlobalHead
from .head import TRMHead, param_groups
from .image_contrast import ImageContrastiveLoss
from .matching import TextRegionMatchingLoss
from .objective import TRMObjective, TRMOutput
from .prompts import PromptEmbeddings, PromptLearner
from .prototypes import PrototypeBank
from .pseudo import PseudoLabeler, PseudoLabels
from .regions import RegionPooler, Regions
from .thresholds import Thresholds, choose_thresholds
from .training_free import GaussianDiscriminant

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "ChunkedTRMObjective",
    "GaussianDiscriminant",
    "GlobalHead",
    "ImageContrastiveLoss",
    "MultimodalContrastiveLoss",
    "PromptEmbeddings",
    "PromptLearner",
    "PrototypeBank",
    "PseudoLabeler",
    "PseudoLabels",
    "RegionDistillationLoss",
    "RegionPooler",
    "Regions",
    "TRMHead",
    "TRMObjective",
    "TRMOutput",
    "TextRegionMatchingLoss",
    "Thresholds",
    "__version__",
    "choose_thresholds",
    "functional",
    "labels",
    "metrics",
    "param_groups",
    "write_features",
]
