"""Measures on this machine which values of the engine draw a model fastest, and keeps them.

`command.tune` goes from a model to a kept choice; `sweeps` decides what is tried, `bench` times it.
"""
