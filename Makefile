# `make demo` and `make test` do all the set-up they need: Python 3.11, g++ and make are enough.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
FAST := .venv-fast
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.cache/torch_extensions
PIP := $(BIN)/pip --disable-pip-version-check -q
FAST_PIP := $(FAST)/bin/pip --disable-pip-version-check -q

# parts of the tests: `make test-NAME` runs those of FILES_NAME; tests/README.md says what is tested where
PARTS := schedule detect report doctor transport proxy runtime deepspeed megatron versions demo docs whole
FILES_schedule := tests/schedule
FILES_detect := tests/detect
FILES_report := tests/report
FILES_doctor := tests/doctor
FILES_transport := tests/transport --ignore=tests/transport/proxy
FILES_proxy := tests/transport/proxy
FILES_runtime := tests/runtime
FILES_deepspeed := tests/patches
FILES_megatron := tests/megatron
FILES_versions := tests/compat
FILES_demo := tests/launch
FILES_docs := tests/docs
FILES_whole := $(wildcard tests/test_*.py)
FILES_timing = $(shell grep -rl --include='test_*.py' 'mark\.timing' tests)
FILES_fast := tests/schedule tests/detect tests/report $(addprefix tests/test_,config.py configuration_path.py shortage.py readme.py map.py)
# more options of pytest for a part, such as SELECT="-k heal"
SELECT ?=

.PHONY: install demo test test-fast test-timing test-matrix $(PARTS:%=test-%) test-pythons test-wheel test-rdma lint docs clean

install: $(VENV)/.installed

# torch first and alone: a looser requirement of another package would bring several GB of CUDA libraries. Python compiles the few
# modules that are imported, when they are: here, and not in several processes of a test at once.
# What the first run would compile, for a minute, is compiled now: the planner's kernels, DeepSpeed's all-reduce over shared memory.
$(VENV)/.installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-compile "torch==2.13.0"
	$(PIP) install --no-compile -e ".[dev]"
	$(BIN)/python -W ignore -c "import torch._dynamo, megatron.core.pipeline_parallel.schedules, wandb, matplotlib.pyplot; \
		from adaptra_plugin.schedule.prepare import prepare; prepare()" >/dev/null & kernels=$$!; \
		PATH="$(CURDIR)/$(BIN):$$PATH" DS_ACCELERATOR=cpu \
			$(BIN)/python -W ignore -c "from deepspeed.comm.torch import build_shm_op as b; b()" >/dev/null && wait $$kernels
	touch $@

demo: install
	$(BIN)/python -m adaptra_plugin.launch.demo --config configs/demo.json --out demo-out

# all but the two that need a package index or a guest kernel
test: lint $(PARTS:%=test-%)

$(PARTS:%=test-%): test-%: install
	$(BIN)/python -m pytest $(FILES_$*) $(SELECT)

# those that measure real time, which other work on the machine disturbs (they are among the parts, too)
test-timing: install
	$(BIN)/python -m pytest -m timing $(FILES_timing)

# more combinations of what the other tests compare, which .ci/run leaves out (they are among the parts, too)
test-matrix: install
	$(BIN)/python -m pytest -m matrix tests/patches tests/megatron

# pure packages, reports and configuration: no torch, no host, no network; under 90 s from a clone
test-fast: $(FAST)/.installed
	$(FAST)/bin/python -m pytest -n auto --dist loadfile -m "not (host or multiprocess or network or slow)" $(FILES_fast)

# the planner's kernels are compiled meanwhile
$(FAST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(FAST)
	$(FAST_PIP) install --no-compile numba
	$(FAST)/bin/python -c "from adaptra_plugin.schedule.prepare import prepare; prepare()" & kernels=$$!; \
		$(FAST_PIP) install --upgrade "pip>=25.1" && $(FAST_PIP) install --no-compile --group pure && wait $$kernels
	touch $@

# a wheel, installed as the README says into a clean environment for each host, trains two ranks (about 3 minutes)
test-wheel: install
	$(BIN)/python -m pytest tests/install

# in a guest kernel with software RDMA devices; builds it (4 minutes, cached) unless ADAPTRA_GUEST_KERNEL names one
test-rdma: install
	tests/rdma/guest/pytest.sh $(BIN)/python

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# the pages of docs/ into site/; a broken link is an error
docs: install
	$(BIN)/mkdocs build --strict

# what needs neither torch nor a host, under each other version of Python that is installed (`make test-pythons PYTHONS=/path/python`)
PYTHONS ?= python3.10 python3.12 python3.13
test-pythons:
	@for python in $(PYTHONS); do \
		version=$$("$$python" -c 'import platform; print(platform.python_version())' 2>/dev/null) \
			|| { echo "$$python is not installed: left out"; continue; }; \
		venv=.cache/pythons/$$version; \
		if [ ! -f "$$venv/.installed" ]; then \
			"$$python" -m venv "$$venv" && "$$venv/bin/python" -m pip -q install --upgrade "pip>=25.1" \
				&& "$$venv/bin/python" -m pip -q install --group pure && touch "$$venv/.installed" || exit 1; \
		fi; \
		echo "Python $$version"; \
		CI=1 "$$venv/bin/python" -m pytest $(FILES_fast) || exit 1; \
	done

clean:
	rm -rf $(VENV) $(FAST) .cache demo-out site build *.egg-info
