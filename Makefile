# make quickstart: everything from nothing to a trained, scored model and a page to look at.
# make test: the default test suite. Both work with nothing installed but Python.

PYTHON ?= python3
PY := .venv/bin/python
RUN := runs/quickstart
DATA := $(RUN)/data
export OMP_WAIT_POLICY := PASSIVE

.PHONY: quickstart test lint clean
.DELETE_ON_ERROR:

quickstart: $(RUN)/gallery.html
	@$(PY) -m benchmarks.quickstart $(RUN)

test: .venv/installed
	$(PY) -m pytest

lint: .venv/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

.venv/installed: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --editable ".[dev]"
	touch $@

$(DATA)/scenes/scenes.json: .venv/installed
	$(PY) -m data.scenes $(DATA)/scenes --train 12000 --val 500 --seed 0

$(DATA)/crowded/scenes.json: .venv/installed
	$(PY) -m data.scenes $(DATA)/crowded --train 3000 --val 100 --seed 1 \
	    --objects 10 14 --min-size 0.13 --max-size 0.3 --max-overlap 0.3

$(DATA)/%/narrations/records.arrow: $(DATA)/scenes/scenes.json
	$(PY) -m data.localized_narratives --images $(DATA)/scenes --out $(@D) \
	    $(DATA)/scenes/annotations/scenes_$*_localized_narratives.jsonl

$(DATA)/%/crowded/records.arrow: $(DATA)/crowded/scenes.json
	$(PY) -m data.coco $(DATA)/crowded/annotations/instances_$*.json \
	    --images $(DATA)/crowded/$* --out $(@D)

clean:
	rm -rf $(RUN)
