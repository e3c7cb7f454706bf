from .distillation.interface import distill_loss as distill_loss
from .labels import DenseLabels as DenseLabels
from .labels import HardLabels as HardLabels
from .labels import SampledLabels as SampledLabels
from .labels import TopKLabels as TopKLabels
from .linear_distillation.interface import linear_distill_loss as linear_distill_loss
