"""Model families behind the engine's interface (engine/family.py), and how a job's model is found.

find_model       files, hub ids and the embedded model, found and checked without torch
model_folder     a model in diffusers' layout: its parts, weights and variants
single_file      a model in one file: what its header says
extra_files      LoRAs, embeddings, VAEs and checkers, which a job names besides its model
hub              files on the Hugging Face hub
headers          what a file of weights holds, without torch and without running a pickle
identify         what kind of model a file is
clip_vocabulary  CLIP's tokenizer from the file in the package
build, weights   what loading any part of a model shares
schedulers       diffusers' schedulers behind the samplers' names
safety_checker   scores pictures of any family
sd1/             Stable Diffusion 1.x
"""
