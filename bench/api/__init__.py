"""The server as others use it: their clients and tests, hostile requests, what forms cost and prompts on disk gain."""
