# make setup     .venv with the pinned versions
# make demo      accuracy against tokens on the two shipped checkpoints: a table and two pictures
# make compare   every method at 25, 10 and 5 % of the tokens: a CSV, a table and a plot (under an hour; goes on where it stopped)
# make lmms-eval lmms-eval beside it, without the torch and transformers that it would bring
# make vllm      .venv-vllm: vLLM's CPU build with the plugin, for tests (on a machine with GPUs: pip install "adav[vllm]")
# make lock      constraints.txt anew, after a requirement changed; UPGRADE=--upgrade takes the newest versions
# make test-fast lint and the tests of methods, FLOPs and the decode kernel: for the loop of someone who edits a method
# make test      lint and all tests but the long ones, on all cores
# make test-all  also the long ones, and those of the extras, which it installs
PYTHON ?= python3
BIN := .venv/bin
# On a terminal pip shows how far it is; in a log it says nothing.
QUIET := $(shell test -t 2 || echo --quiet)
# The test models are tiny: threads of one process would only wait for each other, so each core gets a process. Each
# process takes a run of neighbouring tests (worksteal), so that most fixtures are made once.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

.PHONY: setup demo compare lmms-eval vllm lock test test-fast test-all lint

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(QUIET) --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: .venv/installed
	$(BIN)/python -m llava.eval.demo

compare: .venv/installed
	$(BIN)/python -m llava.eval.compare

lmms-eval: .venv/lmms-eval

# Its own requirements would replace torch and transformers, so that it goes in without them.
.venv/lmms-eval: .venv/installed scripts/lmms_eval/requirements.txt constraints.txt
	$(BIN)/pip install $(QUIET) --constraint constraints.txt --requirement scripts/lmms_eval/requirements.txt
	$(BIN)/pip install $(QUIET) --constraint constraints.txt --no-deps lmms_eval
	@touch $@

vllm: .venv-vllm/installed

# vLLM holds back transformers, so it gets an environment of its own. Its CPU build is for tests alone.
.venv-vllm/installed: pyproject.toml scripts/vllm/requirements.txt scripts/vllm/complete_cpu_build.py
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install $(QUIET) torch==2.13.0
	.venv-vllm/bin/pip install $(QUIET) --no-deps --requirement scripts/vllm/requirements.txt
	.venv-vllm/bin/pip install $(QUIET) --no-deps --editable .
	.venv-vllm/bin/python scripts/vllm/complete_cpu_build.py
	@touch $@

# In the environment as it is: where the lock no longer fits the requirements, it could not be brought up to date first.
lock:
	@test -x $(BIN)/python || $(MAKE) setup
	$(BIN)/pip install $(QUIET) uv==0.13.9
	$(BIN)/python scripts/lock.py $(UPGRADE)

lint: .venv/installed
	$(BIN)/ruff check .

test: lint
	$(TEST) -m "not long"

test-fast: lint
	$(TEST) -m "not long" tests/test_house.py tests/methods tests/costs/test_flops.py tests/kernels/test_decode_kernel.py

# Training (DeepSpeed) and serving (page, API) are tested with the long tests; nothing else needs them.
.venv/extras: .venv/installed
	$(BIN)/pip install $(QUIET) --constraint constraints.txt --editable ".[dev,train,serve,quantised,test-all]"
	@touch $@

test-all: lint .venv/extras lmms-eval vllm
	$(TEST)
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest tests/integrations/vllm tests/integrations/test_family_processors.py
