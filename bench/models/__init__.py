"""Models, vocabularies and traces made at random, with true shapes."""
