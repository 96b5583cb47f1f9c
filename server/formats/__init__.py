"""How model families write reasoning and tool calls: reading them out of an answer's text."""
