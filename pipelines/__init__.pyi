from .config import RunConfig as RunConfig
from .config import load_config as load_config
from .steps import run as run
from .transforms.label_examples import LabelExamples as LabelExamples
from .transforms.predict_examples import PredictExamples as PredictExamples
from .transforms.predict_examples import StudentModelHandler as StudentModelHandler
from .transforms.select_examples import SelectExamples as SelectExamples
from .transforms.write_soft_labels import WriteSoftLabels as WriteSoftLabels
