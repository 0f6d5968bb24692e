"""The stages of the data flow, in the order they run: read, draw, safety, score, write.

A stage is a value that says what it needs and what columns it adds, called with a shard's table
(base.Stage). None imports Ray: batch/ runs them.
"""
