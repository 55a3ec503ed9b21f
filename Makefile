# make run     train the shipped model by SFT, then by DPO, and show what changed (a few minutes, set-up included)
# make test    everything that must hold: exports, clean notebooks, README, style, tests, each notebook on each framework
# make lab     JupyterLab on the notebooks
# make report  one table of all runs under runs/
# make site    write README.md and the site's sidebar anew from the notebooks
# make world   rebuild the shipped model (up to an hour)
# make full    every notebook in full on both frameworks; its table is kept in results/
# make clean   remove the environment and everything that was built or run

PYTHON := $(shell for p in python3.11 python3.12 python3.13 python3; do \
            $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV   ?= .venv
BIN    := $(VENV)/bin
LISTED := constraints.txt settings.ini setup.py pyproject.toml

# Exact versions; Python compiles a module when it is first imported, which is quicker than compiling all of them now.
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

# Two CPU threads beside another busy process are far slower than one, and the shipped models gain little from a second.
ONE    := OMP_NUM_THREADS=1 REALIGN_THREADS=1

# On Apple silicon the default framework is MLX; elsewhere it is torch. `make run` installs that one alone.
FRAMEWORK := $(shell [ "$$(uname -s)-$$(uname -m)" = Darwin-arm64 ] && echo mlx || echo torch)

.PHONY: help run test lab report site world full clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

$(BIN)/python:
	@[ -n "$(PYTHON)" ] || { echo "Python 3.11 or newer is needed: none of python3.11, python3.12, python3.13, python3 is"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Two stages: what a run needs, then what developing needs. A stamp makes the second time fast; a changed list makes it stale.
$(VENV)/run.stamp: $(BIN)/python $(LISTED)
	@echo "Setting up $(VENV) for runs (once) …"
	@$(PIP) -e '.[$(FRAMEWORK),notebooks]'
	@touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	@echo "Setting up $(VENV) for development (once) …"
	@$(PIP) -e '.[dev]'
	@$(PIP) -e '.[tasks]' || echo "reasoning-gym was not installed: its solver takes a C compiler. The tests that need it will say so."
	@sh tools/browser.sh || echo "There is no browser here, and none could be installed: the tests in a browser will say so."
	@touch $@

run: $(VENV)/run.stamp
	@$(ONE) $(BIN)/realign run quickstart

test: $(VENV)/dev.stamp
	@$(ONE) PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/check.py

lab: $(VENV)/dev.stamp
	$(BIN)/jupyter lab --notebook-dir nbs

report: $(VENV)/run.stamp
	@$(BIN)/realign report

site: $(VENV)/dev.stamp
	$(BIN)/python tools/site.py

world: $(VENV)/dev.stamp
	$(BIN)/python -m realign_core.tinyworld.build --out out/tinyworld   # goes on where an interrupted run stopped
	cp -R out/tinyworld/base out/tinyworld/instruct out/tinyworld/properties.json realign_core/tinyworld/

full: $(VENV)/dev.stamp
	$(BIN)/realign run --all --backends torch mlx --out runs/full
	$(BIN)/realign report runs/full --keep results/full

clean:
	rm -rf $(VENV) build dist *.egg-info _proc _docs runs .pytest_cache .ruff_cache .hypothesis
	find realign_core tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
