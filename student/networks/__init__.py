"""Students' networks.

Read in this order: config, build, mlp, cnn, resnet, bag, transformer, laurel, residual, embedding.
Imports: distilbeam.kernels.
"""
