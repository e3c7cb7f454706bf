"""What the benchmarks share: how a measurement is repeated, and what is written beside its figures.

Read in this order: record, steps (time and memory of a step), student_steps (the trainer's own), token_steps (a language
model's last layer), pools; label_loops, stream_ways, choose_loops, beam_peers, loaders, token_labelling, token_decoding,
token_fidelity (what is measured, and the peers).
"""
