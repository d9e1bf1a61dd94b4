# make run       set up .venv and run the main job; flags by ARGS="--rounds 10"
# make test      set up .venv and pass the tests
# make thorough  those too that do for every row of a table what `make test` does for each kind of row
# make quick     the tests of a minute, which start no process and build none of TFF
# make coverage  the tests with the lines of the script that they run, subprocesses included
# make notebook  set up .venv and open the notebook in Jupyter
# make images    the default run, and its pictures into images/ for README
# make benchmarks  every table of benchmarks/, in about a day; runs for accuracies that are there are kept, times are measured again
# make lint      ruff and mypy
# make clean     remove .venv and caches, keep runs/ and the splits that private runs are continued with (.cache/split-*.json)

PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --no-deps
SIDE_BY_SIDE := -n 3 --dist loadfile --no-loadscope-reorder  # a module shares its worker and runs; some tests wait: 3 for 2 cores
SUPPORTED := import platform, sys; \
	print(sys.version_info[:2] == (3, 11) and sys.platform == "linux" and platform.machine() == "x86_64")
supported = $(shell $(PYTHON) -c '$(SUPPORTED)' 2>/dev/null)

run: .venv/run
	$(BIN)/python federated_learning.py $(ARGS)

images: .venv/run
	$(BIN)/python federated_learning.py --runs runs/images --name default
	cp runs/images/default/*.png images/

test: .venv/dev
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(ARGS)

thorough: .venv/dev
	MUTATIONS=$${MUTATIONS:-4000} $(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "" $(ARGS)

quick: .venv/dev
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow and not thorough" $(ARGS)

coverage: .venv/dev
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(SIDE_BY_SIDE) $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --show-missing

notebook: .venv/dev
	$(BIN)/jupyter lab federated_mnist.ipynb $(ARGS)

BENCHMARKS := default_run round_time startup scaling skew adversity compared hosts tuning algorithms paper niid_bench
benchmarks: .venv/dev
	-$(BIN)/python benchmarks/peers.py --install  # one that cannot be installed stops the last two only
	set -e; for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py; done
	$(BIN)/python benchmarks/readme.py
	set -e; for name in peers time_to_target; do $(BIN)/python benchmarks/$$name.py; done
	$(BIN)/python benchmarks/readme.py

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

.venv/run: requirements.txt
	$(if $(filter True,$(supported)),,$(error "$(PYTHON)" is not Python 3.11 on Linux x86-64, which TensorFlow \
	Federated 0.87 needs; install it (Debian 12: apt install python3.11-venv) or give its path: make run PYTHON=/path))
	@echo "Setting up .venv: 80 pinned packages, 3 GB, about two minutes"
	@$(PYTHON) -m venv .venv
	@$(PIP) -r requirements.txt
	@touch $@

.venv/dev: .venv/run tests/requirements.txt
	@echo "Adding the packages of the tests and the notebook"
	@$(PIP) -r tests/requirements.txt
	@touch $@

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .coverage
	if [ -d .cache ]; then find .cache -mindepth 1 ! -path '.cache/split-*.json' -delete; fi

.PHONY: run images test thorough quick coverage notebook benchmarks lint clean
