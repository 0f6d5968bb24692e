"""Model families behind the engine's interface (engine/family.py), and how a job's model is found.

find_model       files, hub ids and the embedded model, found and checked without torch
pickles          what a weights file holds, without running it
build, weights   what loading any part of a model shares
schedulers       diffusers' schedulers behind the samplers' names
safety_checker   scores pictures of any family
sd1/             Stable Diffusion 1.x
"""
