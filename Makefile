# Every target makes the environment that it needs, with the machine's own python3 and pip.
# Nothing has to be installed before; a second run installs nothing.

PYTHON3 ?= python3
WORKERS ?= 2
PYTHON := .venv/bin/python
PIP := -m pip --quiet --quiet --disable-pip-version-check
CODE := $(wildcard src tests examples benchmarks .ci)

# An environment holds these extras of this checkout where it holds a stamp with their names and
# the checksum of pyproject.toml.
KEY := $(firstword $(shell cksum pyproject.toml))
DEMO := .venv/.examples-$(KEY)
TEST := .venv/.examples,test-$(KEY)
LINT := .venv/.examples,test,dev-$(KEY)
OLDEST := .venv-oldest/.oldest-$(KEY)
COMPOSER := .venv-oldest/.oldest,composer-test-$(KEY)

.PHONY: test demo check lint coverage oldest test-composer wheel clean
.NOTPARALLEL:

test: $(TEST)
	$(PYTHON) -m pytest -n $(WORKERS) --dist loadfile -m "not thorough"

demo: $(DEMO)
	$(PYTHON) examples/images.py

check: lint
	$(PYTHON) -m pytest -n $(WORKERS) --dist loadfile

lint: $(LINT)
	.venv/bin/ruff format --quiet --check $(CODE)
	.venv/bin/ruff check --quiet $(CODE)
	.venv/bin/mypy --no-error-summary $(CODE)
	.venv/bin/lint-imports --no-logo
	.venv/bin/python .ci/core_lines.py

# All models of timm, torchvision and transformers beside what others say of them: an hour or more.
coverage: $(TEST)
	PYTHONPATH=examples $(PYTHON) benchmarks/coverage.py

# The tests that say they need torch alone, on the oldest torch that is promised.
oldest: $(OLDEST)
	.venv-oldest/bin/python -m pytest -n $(WORKERS) --dist loadfile -m oldest \
		$$(grep -l 'mark\.oldest' tests/test_*.py)

# The adapter to Composer, which needs a torch older than 2.7.1.
test-composer: $(COMPOSER)
	.venv-oldest/bin/python -m pytest -n $(WORKERS) --dist loadfile tests/with_composer

# What a user gets who has nothing but pip: the wheel, and the torch that it asks for.
wheel:
	@echo "Preparing .venv-wheel: some minutes the first time"
	@$(PYTHON3) -m venv .venv-wheel
	@rm -rf dist
	.venv-wheel/bin/python $(PIP) wheel --no-deps --wheel-dir dist .
	@.venv-wheel/bin/python $(PIP) uninstall --yes stochastic-depth
	.venv-wheel/bin/python $(PIP) install dist/*.whl
	.venv-wheel/bin/python -I -W "ignore:Failed to initialize NumPy" .ci/wheel.py

$(DEMO) $(TEST) $(LINT) $(OLDEST) $(COMPOSER): EXTRAS = $(@F:.%-$(KEY)=%)
$(DEMO) $(TEST) $(LINT) $(OLDEST) $(COMPOSER):
	@echo "Preparing $(@D) [$(EXTRAS)]: some minutes the first time"
	@$(PYTHON3) -m venv $(@D)
	@$(@D)/bin/python $(PIP) install --editable '.[$(EXTRAS)]'
	@touch $@

clean:
	rm -rf .venv .venv-oldest .venv-wheel dist
