# Run in the virtual environment: `source .venv/bin/activate`, or PATH=.venv/bin:$PATH make check

.PHONY: check lint test fix bench

check: lint test

lint:
	ruff format --check .
	ruff check .
	mypy

test:
	pytest -n 2 -m "not ray"
	pytest -m ray

fix:
	ruff format .
	ruff check --fix .

bench:
	python benchmarks/pipeline.py
	python benchmarks/startup.py
