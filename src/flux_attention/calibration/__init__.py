"""Finds, without training, which layers of a model need full attention, and how many."""
