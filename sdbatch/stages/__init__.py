"""The callables that Ray Data runs, in the order they run: read, draw, write.

Each takes and returns a block of one row, which holds one shard (schema.pack); none imports Ray.
"""
