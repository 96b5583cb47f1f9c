"""The offload engine: a GGUF file in, logits and tokens out, inside memory budgets.

It knows no HTTP and no checkpoint. The server and the bench use `engine`; the converter uses the folders `files`,
`resources`, `ggml`, `gguf`, `model` and `text` only.
"""
