"""Students' networks.

Read in this order: config, build, mlp, cnn, resnet, bag, encoder_table, transformer, huggingface, huggingface_files, laurel, residual,
embedding, last_layer.
Imports: distilbeam.kernels, distilbeam.inputs.
"""
