"""LLaVA with fewer vision tokens: AdaV, its rivals, and the measurements, under one interface.

Importing this package imports no torch: the evaluation launcher and the command lines that only
check their input start in a fraction of a second.
"""
