# Two commands for a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes that the tests are divided among, file by file.
JOBS ?= 2
READY := $(VENV)/.ready

# Of the environment in which VLMEvalKit and lmms-eval are held against our scorers. They are installed without the
# hundred packages that they name: tests/peers/stubs.py stands in for those that their scorers do not use.
PEERS := .venv-peers
PEERS_READY := $(PEERS)/.ready

# Of the environment in which vLLM serves; `VLLM=folder make test-vllm` uses one that is elsewhere.
VLLM ?= .venv-vllm

DOCS_READY := $(VENV)/.docs-ready

.PHONY: demo demo-vision docs check test test-slow test-peers test-vllm lint format clean

demo: $(READY)
	$(BIN)/vlm-distill demo

demo-vision: $(READY)
	$(BIN)/python -m vision.demo

# The documentation as a site in site/; links, anchors and every block of the pages are checked.
docs: $(DOCS_READY)
	$(BIN)/python docs/site/build.py
	$(BIN)/pytest -q -m "not slow and not gpu" tests/test_docs.py tests/test_site.py

# While you work: lint, types, and tests that train nothing and start no processes.
QUICK := tests/config/test_config.py tests/config/test_deepspeed_keys.py tests/test_docs.py tests/data/test_layouts.py \
	tests/data/test_mixture.py tests/data/test_sources.py tests/evaluation/scoring tests/losses/test_ctkd.py \
	tests/losses/test_on_logits.py tests/losses/test_taid.py tests/losses/test_topk.py tests/training/test_schedule.py

check: lint
	$(BIN)/pytest -q -n $(JOBS) --dist loadfile -m "not slow and not gpu" $(QUICK)

test: lint
	$(BIN)/pytest -n $(JOBS) --dist loadfile -m "not slow and not gpu" --durations=10

test-slow: $(READY)
	$(BIN)/pytest -m "slow and not gpu"

test-peers: $(PEERS_READY)
	PYTHONPATH=. $(PEERS)/bin/python tests/peers/against_vlmevalkit.py
	PYTHONPATH=. $(PEERS)/bin/python tests/peers/against_lmms_eval.py

# Real servers on loopback, one after the other: about a quarter of an hour on two cores.
test-vllm: $(READY)
	[ -x $(VLLM)/bin/vllm ] || bash tests/vllm/environment.sh $(VLLM) || rm -rf $(VLLM)
	VLLM=$(VLLM) PYTHONPATH=.:tests/vllm:benchmarks:$(VLLM)/smollm2 $(BIN)/pytest tests/vllm/against_vllm.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; PYTHON=... make")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --config-settings editable_mode=compat -e ".[dev]"
	touch $@

$(DOCS_READY): $(READY)
	$(BIN)/pip install --quiet --config-settings editable_mode=compat -e ".[docs]"
	touch $@

$(PEERS_READY): pyproject.toml
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet -e ".[excel]" xlsxwriter levenshtein loguru pytz
	$(PEERS)/bin/pip install --quiet --no-deps ms-vlmeval==0.0.20 lmms-eval==0.7.3
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) .venv-vllm build site dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
