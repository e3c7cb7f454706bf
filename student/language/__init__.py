"""Language models as students: trained token by token from a teacher's stored labels of blocks, in one process or several.

Read in this order: train, config, network, step, sharing, state; folder (what is saved and opened again), evaluate, launch.
Imports: data, networks, checkpoint, training; distilbeam.kernels, distilbeam.teacher.softlabels, distilbeam.inputs.
"""

from distilbeam.student.language.folder import load_language_model as load_language_model
from distilbeam.student.language.train import train_language_model as train_language_model
