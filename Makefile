# `make demo` and `make test` do all the set-up they need: Python 3.11, g++ and make are enough.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.cache/torch_extensions
PIP := $(BIN)/pip --disable-pip-version-check -q

.PHONY: install demo test test-pythons test-wheel test-rdma lint benchmarks clean docs

install: $(VENV)/.installed

# torch first and alone: a looser requirement of another package would bring several GB of CUDA libraries
$(VENV)/.installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "torch==2.13.0"
	$(PIP) install -e ".[dev]"
	touch $@

demo: install
	$(BIN)/python -m adaptra_plugin.launch.demo --config configs/demo.json --out demo-out

test: install lint
	$(BIN)/python -m pytest --ignore=tests/rdma --ignore=tests/install

# a wheel, installed as the README says into a clean environment for each host, trains two ranks (about 4 minutes)
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

clean:
	rm -rf $(VENV) .cache demo-out site build *.egg-info

# the pages of docs/ into site/; a broken link is an error
docs: install
	$(BIN)/mkdocs build --strict

# what needs neither torch nor a host, under each other version of Python that is installed (`make test-pythons PYTHONS=/path/python`)
PYTHONS ?= python3.10 python3.12 python3.13
PURE := tests/detect tests/schedule tests/report tests/test_config.py tests/test_shortage.py
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
		CI=1 "$$venv/bin/python" -m pytest $(PURE) || exit 1; \
	done
