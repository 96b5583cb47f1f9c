"""Files that are read whole or refused, and written whole or not at all.

It imports `offload.errors` alone; the engine, the converter and the server use it for every file that they write.
"""
