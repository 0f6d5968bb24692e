# Run in the virtual environment: `source .venv/bin/activate`, or PATH=.venv/bin:$PATH make check

.PHONY: check lint test slow fix bench

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

fix:
	ruff format .
	ruff check --fix .

bench:
	python benchmarks/pipeline.py
	python benchmarks/startup.py
