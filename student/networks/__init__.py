"""Student networks, one file each; `distilbeam.student.models` chooses among them.

Every network is a fixed graph of its configuration: nothing in a forward pass depends on the values of its inputs, so
that torch.compile and torch.export take it whole with a batch of any size.
"""
