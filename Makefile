# Every target sets up .venv first, once: a second run installs nothing.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
export PYTHONSAFEPATH := 1
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test test-all browser compat check format bench aot gpu-check clean

demo: $(READY)
	$(BIN)/dit-sparse generate --compare-dense --output outputs/demo.mp4 --report outputs/demo-report.json

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "not gpu and not full"

test-all: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "not gpu"

# Debian's Chromium, for the tests of the report page; where there is none they skip and say so.
ROOT := $(if $(filter 0,$(shell id -u)),,sudo)
browser:
	@command -v chromium > /dev/null || command -v chromium-browser > /dev/null || command -v apt-get > /dev/null || \
		{ echo "make browser needs apt-get; elsewhere install Chromium so that 'chromium' is on the PATH" >&2; exit 1; }
	command -v chromium > /dev/null || command -v chromium-browser > /dev/null || { $(ROOT) apt-get update --quiet && \
		$(ROOT) apt-get install --quiet --yes --no-install-recommends chromium fonts-dejavu-core; }

# Old versions of diffusers, each in build/compat; about half an hour. Writes the table in README.md.
compat: $(READY)
	$(BIN)/python tests/compat.py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy does not follow package-dir: show it the packages where they are imported.
	mkdir -p build/typecheck/dit_sparse
	for f in $(CURDIR)/dit_sparse/*; do ln -sfn $$f build/typecheck/dit_sparse/$$(basename $$f); done
	for d in kernels pipelines eval; do ln -sfn $(CURDIR)/$$d build/typecheck/dit_sparse/$$d; done
	cd build/typecheck && MYPYPATH=. $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p dit_sparse

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/dit-sparse bench kernels

# Compiles what changed since kernels/RESOURCES.md was made; about a second for each variant and target.
aot: $(READY)
	$(BIN)/python -m dit_sparse.kernels.roofline
	$(BIN)/python -m dit_sparse.kernels.aot

# For whoever has a GPU: its tests and benchmarks in one command.
gpu-check: $(READY)
	$(BIN)/pytest -m gpu
	$(BIN)/dit-sparse bench kernels --device cuda --backward --output 'outputs/gpu-{device}.csv'

clean:
	rm -rf build dist outputs .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[train,eval,dev]"
	touch $(READY)
