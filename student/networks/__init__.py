"""Students' networks.

Read in this order: config, build, mlp, cnn, resnet, bag, transformer, laurel, residual, embedding, last_layer.
Imports: distilbeam.kernels.
"""
