"""Router traces replayed through cache policies."""
