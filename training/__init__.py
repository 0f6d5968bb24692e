"""How `builtin:shapes` was made, from nothing but a seed: `python -m training FOLDER`.

`scenes` gives the pictures and captions of each step, `autoencoder` and `denoiser` are the two
trainings, `loop` is what they share, `__main__` runs both and writes the model.
"""
