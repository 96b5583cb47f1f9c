"""The page at `/`: a chat and the map of experts, as files that a browser takes without a key.

`files/` holds them: HTML, CSS and JavaScript modules, served as they are.
"""
