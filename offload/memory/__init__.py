"""What a model remembers of the tokens it has read: keys and values in cells, and the states of recurrent layers.

`Cells` lends cells and states to sequences, which share what they have in common; a `KVStore` holds their contents, in
the memory of the host and of devices. The graphs read and write them, and the scheduler asks for them; where a token's
keys lie is nobody else's business.
"""
