"""Transformers: graphs for the vision tower of a model that is already loaded."""
