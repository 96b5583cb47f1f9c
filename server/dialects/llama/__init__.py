"""llama-server's own endpoints: completions with its fields, infilling, properties and slots."""
