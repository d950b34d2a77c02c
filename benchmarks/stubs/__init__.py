"""Stubs in place of engines, where only the data path is measured: they invent tokens, and are no engines."""
