# Run in the virtual environment: `source .venv/bin/activate`, or PATH=.venv/bin:$PATH make check

.PHONY: check lint test slow chaos fix bench

check: lint test

lint:
	ruff format --check .
	ruff check .
	mypy
	deptry sdbatch
	deptry . benchmarks --ignore DEP004  # these import what `dev` declares

test:
	pytest -n 2 -m "not ray and not slow"
	pytest -m "ray and not slow"

slow:
	pytest -m slow

chaos:
	python -m tests.chaos.campaign --faults 300 --output benchmarks/results/chaos
	python -m tests.chaos.pairs --pairs 20 --output benchmarks/results/pairs.json

fix:
	ruff format .
	ruff check --fix .

bench:
	python benchmarks/pipeline.py
	python benchmarks/startup.py
