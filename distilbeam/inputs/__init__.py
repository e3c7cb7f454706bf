"""Model inputs: Arrow columns become what a teacher or a student reads.

Read in this order: config (the setting and `make_input`), then a file a kind: tensors, images, texts, tokens, raw, functions;
columns and converting have what they share. Of language models: tokenizer (what an id means), blocks (rows of tokens).
Imports: distilbeam.settings, distilbeam.extras.
"""
