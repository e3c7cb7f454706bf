"""Kinds of input, one file each; `distilbeam.teacher.preprocess` chooses among them."""
