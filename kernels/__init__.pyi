from .distillation.interface import distill_loss as distill_loss
from .fp8.interface import fp8_linear as fp8_linear
from .labels import DenseLabels as DenseLabels
from .labels import HardLabels as HardLabels
from .labels import SampledLabels as SampledLabels
from .labels import TopKLabels as TopKLabels
from .laurel.interface import laurel_residual as laurel_residual
from .linear_distillation.interface import linear_distill_loss as linear_distill_loss
