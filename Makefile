# Every target sets .venv up first. The stamp is named after what the set-up depends on, so that it is redone when
# their content changes and only then.
SET_UP_BY := pyproject.toml constraints.txt setup.py $(wildcard kernels/*.cpp kernels/*.h)
STAMP := .venv/.set-up-$(shell cat $(SET_UP_BY) | sha256sum | cut -c1-16)
FRAMEWORKS := torch flax mindspore jittor

# The pinned versions are those for Python 3.11.
PYTHON = $(shell command -v python3.11 \
	|| { python3 -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && command -v python3; })
RUN = .venv/bin/python tools/elapsed.py .venv/set-up.log

.PHONY: help setup lint test conform clean

help:
	@echo "make conform  check every framework against the NumPy reference and print the matrix"
	@echo "make test     run every test"
	@echo "make lint     check style and types"
	@echo "make setup    install everything into .venv; the targets above do so themselves"
	@echo "make clean    remove builds, reports and caches, but not .venv"

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
		-e '.[torch,flax,mindspore,jittor,dev]'
	@echo "set-up 3/3: Jittor compiles itself, about 3 minutes the first time on a machine"
	@$(RUN) .venv/bin/python -c 'import rbn.backends.jittor'
	@touch $@

lint: $(STAMP)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	@# mypy looks for modules by their folder: give it the tree of import names.
	@rm -rf build/types && mkdir -p build/types/rbn
	@ln -s "$(CURDIR)"/rbn/* $(foreach name,backends kernels conformance benchmarks,"$(CURDIR)"/$(name)) build/types/rbn/
	@ln -s "$(CURDIR)"/rbn_core build/types/
	cd build/types && ../../.venv/bin/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p rbn -p rbn_core

# Jittor and PyTorch in one process have crashed: one process each, and all of them even when one fails.
# The tests of a framework must reach 95 % of its backend's lines.
test: $(STAMP)
	@rm -f .coverage.*; failed=; \
	echo "pytest"; .venv/bin/pytest || failed="$$failed, pytest"; \
	for name in $(FRAMEWORKS); do \
		tests="pytest --framework $$name"; data="--data-file=.coverage.$$name"; \
		echo "$$tests"; \
		.venv/bin/coverage run $$data -m $$tests || failed="$$failed, $$tests"; \
		.venv/bin/coverage combine --quiet $$data; \
		.venv/bin/coverage report $$data --include="backends/$$name/*" --fail-under=95 \
			|| failed="$$failed, coverage of $$name"; \
	done; \
	test -z "$$failed" || { echo "failed: $${failed#, }" >&2; exit 1; }

conform: $(STAMP)
	.venv/bin/rbn conform $(FRAMEWORKS)

clean:
	rm -rf build dist reports htmlcov .coverage .coverage.* *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis rank_0 \
		kernel_meta rewritten_network
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
