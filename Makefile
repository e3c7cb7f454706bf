# Every target sets up what it needs in .venv; a machine with Python 3.11+, make and a compiler is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEV := $(VENV)/.ready-dev
DOCS := $(VENV)/.ready-docs
EXTRAS := dev,dask,hf,onnx,pubsub,tensorboard,torchao,tpu,triton
PARTS := kernels pipelines selection student teacher
NUMERIC := tests/selection tests/kernels tests/student/training tests/student/networks tests/student/language tests/science
SEED ?= 0
DEMO ?= demo
# On every processor, where pip uses one; packages hold files of other Pythons, which do not compile and need not.
COMPILE = @$(BIN)/python -m compileall -q -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true

.PHONY: demo docs test test-base test-processors test-all test-fast test-prism lint types dist bench clean
.DEFAULT_GOAL := demo

# PYTHONWARNINGS: setuptools warns of every editable installation, in ten lines.
$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (a few minutes the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; assert sys.version_info >= (3, 11), "distilbeam needs Python 3.11 or newer"'
	@$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e .
	$(COMPILE)
	@touch $@

$(DEV): $(READY)
	@echo "Adding what the tests need to $(VENV) ..."
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[$(EXTRAS)]'
	$(COMPILE)
	@touch $@

$(DOCS): $(READY)
	@echo "Adding what the manual needs to $(VENV) ..."
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[docs]'
	@touch $@

demo: $(READY)  ## the main job, end to end, on handwritten digits
	@test -f $(DEMO)/distilbeam.toml || $(BIN)/distilbeam init $(DEMO) --example digits --seed $(SEED)
	@$(BIN)/distilbeam run $(DEMO)/distilbeam.toml

test: $(DEV)  ## the tests, with one thread each; a third process uses the time in which others wait for theirs
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist worksteal -m "not exhaustive"

test-base: $(READY)  ## every base command, where nothing but the base dependencies is installed: a fresh clone
	@DISTILBEAM_BASE_ONLY=1 $(BIN)/python -m unittest -v tests/base_install/test_commands.py

# What OpenBLAS, MKL and torch choose on another processor: sums in another order, other last bits.
test-processors: $(DEV)  ## the numeric parts with the instructions of an older processor
	@OMP_NUM_THREADS=1 OPENBLAS_CORETYPE=Haswell MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2 \
	  $(BIN)/python -m pytest -q -n 3 --dist worksteal -m "not slow and not exhaustive" $(NUMERIC)

test-all: $(DEV)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

test-fast: $(DEV)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not exhaustive"

test-prism: $(DEV)  ## pipelines on Prism, streams with a Kafka broker too, where they are found (PRISM, KAFKA_JARS); else skipped
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/pipelines/streaming
	@OMP_NUM_THREADS=1 DISTILBEAM_RUNNER=PrismRunner $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not exhaustive" \
	  tests/pipelines --ignore=tests/pipelines/streaming

lint: $(DEV)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(DEV)  # the parts are installed as distilbeam.<part>; these links show mypy the same layout
	@rm -rf .mypy/distilbeam && mkdir -p .mypy/distilbeam
	@ln -s $(addprefix ../../,$(PARTS) $(wildcard distilbeam/[a-z]*) distilbeam/__init__.py) .mypy/distilbeam/
	@$(BIN)/mypy $(addprefix .mypy/distilbeam/,$(PARTS) storage inputs settings.py setting_docs.py __init__.py)

docs: $(DOCS)  ## the manual in site/, built strictly: a link that leads nowhere is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict --clean
	@echo "The manual: site/index.html"

dist: $(DEV)  ## wheel and source distribution in dist/
	@rm -rf build dist
	@$(BIN)/python -m build --quiet --outdir dist .
	@ls -1 dist

bench: $(DEV)  ## every benchmark in its short form; each takes --help
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script --quick || exit 1; done

clean:
	@rm -rf build dist site .mypy .mypy_cache .pytest_cache .ruff_cache *.egg-info
