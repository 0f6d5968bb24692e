"""Text to image on one device: torch, diffusers and transformers, and nothing of Ray or Arrow.

    engine = Engine(load(files, Build("cpu", "float32")), lanes=16, threads=1)
    future = engine.submit(Request(...))
    drawn = future.result()

Read in this order: request, engine, lanes, cohort, sd1, finish; then text, samplers, loading.
`checkpoint` looks at model files without torch.
"""
