"""The equations as slow loops over numbers in float64; nothing here calls the package."""

from tests.helpers.oracles.calibration import calibration_error, platt, promise, single_positives
from tests.helpers.oracles.contrasts import contrast, multi_label
from tests.helpers.oracles.global_head import GlobalHead
from tests.helpers.oracles.logits import asymmetric, asymmetric_gradient, distillation, matching_logits
from tests.helpers.oracles.numbers import Array, array, log_sum_exp, sigmoid, softmax, unit
from tests.helpers.oracles.pooling import layer_norm, pool, sinkhorn, transport
from tests.helpers.oracles.pseudo import Bank, Labeler, discriminant, discriminant_scores, similarities
