"""Trains the embedded model from a seed alone, without data: `python -m training FOLDER`.

`scenes` generates the pictures of each step. `text_encoder`, `autoencoder` and `denoiser` each
train one network with the shared `loop`. `__main__` runs them and saves the model.
"""
