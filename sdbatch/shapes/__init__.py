"""The world of the embedded model: what its pictures show, how prompts say it, who judges it.

`world` has the scenes, `picture` renders one, `wording` says one in words and reads such words
back, `judge` reads a picture and compares it with what its prompt asks for. Nothing here knows a
model: training, scoring and tests all use the same four.
"""
