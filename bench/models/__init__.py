"""Models, vocabularies and traces made at random, with true shapes, and small models that are trained."""
