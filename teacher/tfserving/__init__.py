"""TensorFlow Serving's PredictionService: a client that does not load TensorFlow, and a server for any teacher or student.

Read in this order: client, probing, signatures, calling, channels; serve, serve_options, service, receiving; messages, tensors for both.
Imports: teacher's protocol, predict, config and load.
"""
