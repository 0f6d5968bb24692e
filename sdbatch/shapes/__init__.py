"""The scenes that the embedded model draws, and the judge that checks its pictures.

`world` defines scenes, `picture` renders one, `captions` describes one in words, `parse` reads a
prompt back into a scene, `vision` reads a picture, and `judge` compares a picture with its prompt.
`vocabulary` lists the words. Nothing here depends on a model: training, scoring and tests share it.
"""
