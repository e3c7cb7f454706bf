from distilbeam.inputs.config import InputConfig as InputConfig
from distilbeam.inputs.config import make_input as make_input

from .config import TeacherConfig as TeacherConfig
from .load import load_teacher as load_teacher
from .predict import Answers as Answers
from .predict import RowError as RowError
from .predict import ask as ask
from .protocol import Teacher as Teacher
from .protocol import TeacherChanged as TeacherChanged
from .protocol import TeacherMisfit as TeacherMisfit
from .protocol import TeacherUnavailable as TeacherUnavailable
from .softlabels.inspect import inspect_labels as inspect_labels
from .softlabels.verify import verify_labels as verify_labels
from .tfserving.serve import TeacherServer as TeacherServer
from .tfserving.serve import serve as serve
from .tfserving.serve_options import ServeOptions as ServeOptions
