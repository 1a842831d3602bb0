# Every target sets .venv up first. The stamp is named after what the set-up depends on, so that it is redone when
# their content changes and only then.
SET_UP_BY := pyproject.toml constraints.txt setup.py $(wildcard kernels/*.cpp kernels/*.h)
STAMP := .venv/.set-up-$(shell cat $(SET_UP_BY) | sha256sum | cut -c1-16)
FRAMEWORKS := torch flax mindspore jittor

# Processes run side by side: a thread of OpenMP that waits sleeps, and leaves its processor to the others.
export OMP_WAIT_POLICY ?= passive

# The pinned versions are those for Python 3.11.
PYTHON = $(shell command -v python3.11 \
	|| { python3 -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && command -v python3; })
RUN = .venv/bin/python tools/elapsed.py .venv/set-up.log

# The newest of everything, which no file names: python3.12 may be a shim that runs nothing, so each is tried.
PYTHON_NEWEST ?= $(shell for each in python3.12 "$$HOME"/.pyenv/versions/3.12.*/bin/python3.12 python3; do \
	"$$each" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && echo "$$each" && break; done)
NEWEST := .venv-newest
NEWEST_STAMP := $(NEWEST)/$(notdir $(STAMP))
NEWEST_FRAMEWORKS := flax $(if $(TORCH),torch)
NEWEST_TESTS := $(if $(LONG),tests/$$name --ignore tests/$$name/test_zoos.py,\
	tests/test_layers.py tests/$$name/test_layers.py tests/$$name/test_surgery.py)
RUN_NEWEST = $(NEWEST)/bin/python tools/elapsed.py $(NEWEST)/set-up.log

# Libraries that meet the layers, with the versions of both files.
INTEGRATIONS := .venv-integrations
INTEGRATIONS_STAMP := $(INTEGRATIONS)/.set-up-$(shell cat $(SET_UP_BY) constraints-integrations.txt | sha256sum | cut -c1-16)
RUN_INTEGRATIONS = $(INTEGRATIONS)/bin/python tools/elapsed.py $(INTEGRATIONS)/set-up.log

.PHONY: help setup lint types test conform newest integrations clean

help:
	@echo "make conform  check every framework against the NumPy reference and print the matrix"
	@echo "make test     run the tests; with LONG=1 the long searches, too"
	@echo "make lint     check style and types"
	@echo "make newest   check Flax, and with TORCH=1 PyTorch, in the newest versions there are, on Python 3.12"
	@echo "make integrations  run the libraries that users put the layers into: Lightning, mmdet, ultralytics and others"
	@echo "make setup    install everything into .venv; the targets above do so themselves"
	@echo "make clean    remove builds, reports and caches, but no environment"

setup: $(STAMP)

$(STAMP):
	@test -n "$(PYTHON)" || { echo "The set-up needs Python 3.11 as python3.11 or python3: install it." >&2; exit 1; }
	@command -v g++ >/dev/null || { echo "Jittor compiles itself with g++: install g++." >&2; exit 1; }
	@echo "set-up 1/3: creating .venv with $(PYTHON)"
	@rm -f .venv/.set-up-* .venv/set-up.log
	@$(PYTHON) -m venv .venv
	@echo "set-up 2/3: installing the four frameworks and the tools, about 90 s and 4 GB"
	@$(RUN) .venv/bin/python -m pip install -c constraints.txt pip setuptools
	@$(RUN) .venv/bin/python -m pip install -c constraints.txt --no-build-isolation \
		-e '.[cli,torch,flax,mindspore,jittor,dev]'
	@echo "set-up 3/3: Jittor compiles itself, about 3 minutes the first time on a machine"
	@$(RUN) .venv/bin/python -c 'import rbn.backends.jittor'
	@touch $@

lint: $(STAMP)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	@$(MAKE) --no-print-directory types

types: $(STAMP)
	@# mypy looks for modules by their folder: give it the tree of import names.
	@rm -rf build/types && mkdir -p build/types/rbn
	@ln -s "$(CURDIR)"/rbn/* $(foreach name,backends kernels conformance benchmarks formats training,"$(CURDIR)"/$(name)) \
		build/types/rbn/
	@ln -s "$(CURDIR)"/rbn_core build/types/
	cd build/types && ../../.venv/bin/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p rbn -p rbn_core

test: $(STAMP)
	@.venv/bin/python tools/tests.py $(if $(LONG),--long)

conform: $(STAMP)
	.venv/bin/rbn conform $(FRAMEWORKS)

# Installed again when the project changes; upgraded each time, so that what a new release breaks shows by itself. The
# model zoos are left out: each of their releases is for one of the frameworks'. The suite runs one case of each row, and the
# tests are those of the layers and of convert; with LONG=1 they are all.
newest: $(NEWEST_STAMP)
	@echo "newest: upgrading $(NEWEST)"
	@$(RUN_NEWEST) $(NEWEST)/bin/python -m pip install --upgrade --upgrade-strategy eager pip setuptools \
		$$($(NEWEST)/bin/python tools/requirements.py cli test $(NEWEST_FRAMEWORKS))
	@$(NEWEST)/bin/python -m pip list --format freeze | grep -E '^(flax|jax|jaxlib|numpy|optax|orbax-checkpoint|torch)=='
	$(NEWEST)/bin/rbn conform $(NEWEST_FRAMEWORKS) $(if $(LONG),,--quick)
	@for name in $(NEWEST_FRAMEWORKS); do \
		echo "pytest -n 2 --framework $$name" $(NEWEST_TESTS); \
		$(NEWEST)/bin/pytest -n 2 --dist loadfile --framework $$name $(NEWEST_TESTS) -m "not long" || exit; done

$(NEWEST_STAMP):
	@test -n "$(PYTHON_NEWEST)" || { echo "make newest needs Python 3.12, as python3.12, of pyenv, or named by" \
		"PYTHON_NEWEST=/path/to/python: install it." >&2; exit 1; }
	@echo "newest: setting $(NEWEST) up with $(PYTHON_NEWEST)"
	@rm -f $(NEWEST)/.set-up-* $(NEWEST)/set-up.log
	@"$(PYTHON_NEWEST)" -m venv $(NEWEST)
	@$(RUN_NEWEST) $(NEWEST)/bin/python -m pip install --upgrade pip setuptools
	@$(RUN_NEWEST) $(NEWEST)/bin/python -m pip install --no-build-isolation -e '.[cli,test,flax]'
	@touch $@

integrations: $(INTEGRATIONS_STAMP)
	$(INTEGRATIONS)/bin/pytest --framework torch tests/integrations/torch
	$(INTEGRATIONS)/bin/pytest --framework flax -m "not long" tests/integrations/flax
	$(INTEGRATIONS)/bin/pytest tests/integrations/test_strangers.py

$(INTEGRATIONS_STAMP):
	@test -n "$(PYTHON)" || { echo "The set-up needs Python 3.11 as python3.11 or python3: install it." >&2; exit 1; }
	@echo "integrations: setting $(INTEGRATIONS) up with $(PYTHON), about 3 GB"
	@rm -f $(INTEGRATIONS)/.set-up-* $(INTEGRATIONS)/set-up.log
	@$(PYTHON) -m venv $(INTEGRATIONS)
	@$(RUN_INTEGRATIONS) $(INTEGRATIONS)/bin/python -m pip install -c constraints.txt pip setuptools wheel
	@$(RUN_INTEGRATIONS) $(INTEGRATIONS)/bin/python -m pip install -c constraints.txt -c constraints-integrations.txt \
		-e '.[integrations]'
	@touch $@

clean:
	rm -rf build dist reports htmlcov .coverage .coverage.* *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis rank_0 \
		kernel_meta rewritten_network
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +
