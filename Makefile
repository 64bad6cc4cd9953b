# Development tasks. `make quickstart` and `make test` need only Python 3.11 to 3.13, make and access to PyPI.

PYTHON ?= python3
BIN := .venv/bin
QUICKSTART := configs/quickstart.yaml

.PHONY: help quickstart test faults fuzz mutants check docs site bench bench-data quality lock clean

help:
	@echo "make quickstart   train a small model on built-in text and generate a sample (5 minutes)"
	@echo "make test         lint, type checks and the test suite"
	@echo "make faults       long tests: runs killed at every write, 10 GB of text"
	@echo "make fuzz         give 10,000 damaged files to each reader, and requests to the server (hours)"
	@echo "make mutants      change the code in 100 places and report changes that no test notices (hours)"
	@echo "make check        lint and type checks only"
	@echo "make bench        compare the training step with mlx-lm and PyTorch: time and memory (1 hour)"
	@echo "make quality      compare model quality across optimizers and options, 3 seeds (hours)"
	@echo "make bench-data   compare data pipeline throughput with other programs (minutes)"
	@echo "make docs         regenerate docs/configuration.md from the schema"
	@echo "make site         build the documentation as a site in site/"
	@echo "make lock         update the pinned dependencies in locks/"
	@echo "make clean        remove .venv, caches, and the quickstart's run and shards"

quickstart: .venv/run.done
	@$(BIN)/python -m anarchobot.system.blas >/dev/null || $(MAKE) --no-print-directory .venv/blas.done
	$(BIN)/anarchobot tokenizer train $(QUICKSTART)
	$(BIN)/anarchobot pretokenize $(QUICKSTART)
	$(BIN)/anarchobot pretrain $(QUICKSTART) --resume-from auto || { echo "resume with: make quickstart"; exit 1; }
	@echo
	@echo "a sample, which should look like Python, because the training text is Python's standard library:"
	$(BIN)/anarchobot generate --checkpoint runs/quickstart
	@echo
	@echo "next, a model of your own texts:"
	@echo "  source .venv/bin/activate"
	@echo "  anarchobot train FOLDER --time 30m"

test: check
	$(BIN)/python -m pytest -n 2

faults: .venv/dev.done
	$(BIN)/python -m pytest -m faults -n 2 --timeout 3600

# FUZZ_INPUTS=N FUZZ_SEED=N make fuzz: N inputs of each reader (default: 10000), from another seed (default: 0).
fuzz: .venv/fuzz.done
	$(BIN)/python -m pytest -m fuzz -rP --timeout 36000 tests/fuzz

mutants: .venv/dev.done
	$(BIN)/python scripts/mutants.py

check: .venv/dev.done
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: .venv/torch.done
	$(BIN)/python benchmarks/training.py small --cores 1 2
	$(BIN)/python benchmarks/training.py gradients
	$(BIN)/python benchmarks/training.py techniques
	$(BIN)/python benchmarks/training.py 137M --rounds 1
	$(BIN)/python benchmarks/lora.py small

quality: .venv/dev.done
	$(BIN)/python benchmarks/quality.py --runs exportable adamw --jobs 2
	$(BIN)/python benchmarks/quality.py --steps 500 --jobs 2 --output benchmarks/results/levers.json
	$(BIN)/python benchmarks/steps.py --jobs 2

bench-data: .venv/dev.done
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/batches.py

docs: .venv/dev.done
	$(BIN)/python scripts/write_config_docs.py

site: .venv/dev.done
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lock: .venv/dev.done
	$(BIN)/pip install --quiet uv
	for part in run dev blas; do \
	  $(BIN)/uv pip compile --quiet pyproject.toml --universal --python-version 3.11 --generate-hashes --upgrade \
	    --no-emit-index-url --no-annotate --no-header --extra $$([ $$part = run ] && echo fast || echo $$part) -o locks/$$part.lock; \
	done

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis runs/quickstart shards/quickstart

# One virtual environment; each .done file marks a lock file as installed.
.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "$(PYTHON) is not Python 3.11 to 3.13: try make PYTHON=python3.12 quickstart"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/%.done: locks/%.lock pyproject.toml | .venv/bin/python
	@echo "installing the packages of $<, which may take minutes"
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r $<
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

# PyTorch and the programs that tests and benchmarks compare with. Tests that need them are skipped if they are missing.
.venv/torch.done: .venv/dev.done
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0 peft==0.21.2 trl==1.16.0 \
	  lm-eval==0.4.13 gensim==4.4.0 openai==3.54.0 playwright==1.65.2 datatrove==0.10.1
	@touch $@

# Schemathesis, which sends requests that follow an OpenAPI description, and the harness.
.venv/fuzz.done: .venv/dev.done
	$(BIN)/pip install --quiet --disable-pip-version-check schemathesis==4.32.5 lm-eval==0.4.13
	@touch $@

# Installs MKL if no fast BLAS is found; without one, training is several times slower.
.venv/blas.done: locks/blas.lock | .venv/bin/python
	@if [ "$$(uname -sm)" = "Linux x86_64" ]; then \
	  echo "no fast BLAS found: installing MKL (300 MB)"; \
	  $(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r $<; \
	fi
	@touch $@
