"""Jobs: a distillation run, a labelling job, a watched directory; what their directories hold.

Read in this order: directory, opening; encoder_start, run, freeze, recorded_phases, step, label_step, kept_student, distillation, final_result,
final_training, cross_fitting, variants;
pool_labels, blocks (of tokens), labelling_plan, labelling; watch, watch_files, watch_journal, watch_window; set_notes, teacher_check, weak_teacher,
pool_check, pool_rows, label_text (what is checked, and what `verify` and `inspect` read), labels_of_place; work_log.
Imports: labelling, acquisition, pool, engine.
"""
