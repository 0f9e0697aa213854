"""Families of models in vLLM: one file per family, with what differs from the others.

processor.py and selecting.py, one folder up, have what all families share.
"""
