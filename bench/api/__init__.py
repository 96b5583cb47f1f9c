"""The server as others use it: their clients and tests, hostile requests, and what answers with a form cost."""
