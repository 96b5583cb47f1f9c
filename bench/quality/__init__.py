"""Tables of quality and speed for compressed files."""
