"""Requests in, images out, on one device: torch, and nothing of Ray, Arrow or a model family.

    engine = Engine(family, lanes=16, threads=1)
    future = engine.submit(Request(...))
    drawn = future.result()

Read in this order: request, family, engine, lanes, cohort, decode; faults has the fault policy.
"""
