"""TensorFlow Serving's PredictionService: a client that does not load TensorFlow, and a server for any teacher."""
