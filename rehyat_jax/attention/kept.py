"""Names under which the operator's and feature maps' results may be kept by rematerialisation."""

from pallas_kernels.options import KEPT_ATTENTION as KEPT_ATTENTION
from pallas_kernels.options import KEPT_FEATURES as KEPT_FEATURES
