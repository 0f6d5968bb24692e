"""The pictures of rows: their files are read, checked, and fitted to the image that is drawn.

Pillow and numpy only. How the files are found and fetched belongs to the prompts, what the
pictures do to the image to the engine.
"""
