"""Jobs: a distillation run, a labelling job, a watched directory; what their directories hold.

Read in this order: directory; run, freeze, recorded_phases, distillation; pool_labels, labelling_plan, labelling; watch and its
parts; work_log.
Imports: labelling, acquisition, pool, engine.
"""
