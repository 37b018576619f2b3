"""Test of the paper's claim: models that differ in their training counts, at every count."""
