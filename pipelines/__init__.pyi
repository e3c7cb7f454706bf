from .config import RunConfig as RunConfig
from .config import load_config as load_config
from .selecting_stream import SelectExamples as SelectExamples
from .steps import run as run
from .transforms import LabelExamples as LabelExamples
from .writing_stream import WriteSoftLabels as WriteSoftLabels
