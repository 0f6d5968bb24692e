"""Makes an embedded model that can draw, from nothing but a seed: `python -m training FOLDER`.

`scenes` gives the pictures of each step, `text_encoder`, `autoencoder` and `denoiser` are the three
trainings, `loop` is what they share, `__main__` runs them and writes the model.
"""
