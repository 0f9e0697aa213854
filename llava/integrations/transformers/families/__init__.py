"""Families of models for `compress`: one file per family, with what differs from the others.

base.py has the interface, `Family`. compression.py and prompts.py, one folder up, have what all families share.
"""
