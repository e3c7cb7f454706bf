"""Teachers of tokens: language models that label every position of a block.

Read in this order: protocol, causal_lm (a model in this process), segments (how it keeps texts apart), head (its last layer
without the others), encoding (logits to labels where the logits are), served (a model behind
a server), handled (behind a ModelHandler of Beam), texts (of a block, and where their answers go), server_calls (requests that are
repeated), server_answers (what vLLM and SGLang say); block_answers (what the labelling asks).
Imports: teacher's protocol, config, fingerprint, backends, softlabels and tfserving.
"""
