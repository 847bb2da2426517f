"""The equations of the package as pure functions; every Module is a thin shell over one of them.

Letters: B batch, C classes, D joint embedding width, N tokens, H heads. Labels: 1 present, 0 absent, values between
are soft, -1 unknown. Losses and similarities of half-precision inputs are computed in float32, with autocast off, and the
result is float32. Shapes, types and devices that do not fit are refused by name; values are the caller's, and are checked by
the Modules.
"""

from .._entries import Entries
from ._shapes import Reduction
from .asymmetric import asymmetric_loss
from .attention import region_attention, saliency_map
from .contrast import multimodal_contrastive
from .distillation import region_distillation
from .image_contrast import multi_label_contrastive
from .matching import boost_logits, text_region_logits
from .prototypes import class_sums, update_prototypes
from .similarities import Similarities, calibrate, prototype_similarities, standardise
from .transport import sinkhorn_attention, transport_attention

__all__ = [
    "Entries",
    "Reduction",
    "Similarities",
    "asymmetric_loss",
    "boost_logits",
    "calibrate",
    "class_sums",
    "multi_label_contrastive",
    "multimodal_contrastive",
    "prototype_similarities",
    "region_attention",
    "region_distillation",
    "saliency_map",
    "sinkhorn_attention",
    "standardise",
    "text_region_logits",
    "transport_attention",
    "update_prototypes",
]
