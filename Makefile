# make quickstart: everything from nothing to a trained, scored model and a page to look at.
# make test: the default test suite. Both work with nothing installed but Python.
# make small: the same model after an hour. make joint: one model for every task, from small, in
# another hour. make joint-long: more steps of the same, some hours.
# make ref: expressions alone, located and segmented, from small; not yet run whole.
# make perceptiongpt: the second paper's model, on the same scenes. make perceptiongpt-all: it
# learns captions, conversations and answers that point besides.

PYTHON ?= python3
PY := .venv/bin/python
RUN := runs/quickstart
DATA := $(RUN)/data
export OMP_WAIT_POLICY := PASSIVE

.PHONY: quickstart small joint joint-long ref perceptiongpt perceptiongpt-all test lint clean
.DELETE_ON_ERROR:

quickstart: $(RUN)/gallery.html
	@$(PY) -m pixelllm.cli info $(RUN)
	@echo "open $(RUN)/gallery.html"

test: .venv/installed
	$(PY) -m pytest

lint: .venv/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

.venv/installed: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --editable ".[dev]"
	touch $@

$(DATA)/scenes/scenes.json: | .venv/installed
	$(PY) -m data.scenes $(DATA)/scenes --train 12000 --val 500 --seed 0

$(DATA)/busy/scenes.json: | .venv/installed
	$(PY) -m data.scenes $(DATA)/busy --train 4000 --val 100 --seed 1 \
	    --objects 6 7 --min-size 0.2 --max-size 0.42 --max-overlap 0.4

$(DATA)/narrations_%/records.arrow: $(DATA)/scenes/scenes.json
	$(PY) -m data.localized_narratives --images $(DATA)/scenes --out $(@D) \
	    $(DATA)/scenes/annotations/scenes_$*_localized_narratives.jsonl

$(DATA)/regions_%/records.arrow: $(DATA)/scenes/scenes.json
	$(PY) -m data.coco $(DATA)/scenes/annotations/instances_$*.json \
	    --images $(DATA)/scenes/$* --out $(@D)

$(DATA)/busy_%/records.arrow: $(DATA)/busy/scenes.json
	$(PY) -m data.coco $(DATA)/busy/annotations/instances_$*.json \
	    --images $(DATA)/busy/$* --out $(@D)

# The two halves of the model's eyes learn side by side, one thread each.
$(RUN)/sam/model.safetensors: $(DATA)/busy_train/records.arrow $(DATA)/busy_val/records.arrow
	$(PY) train.py scenes-sam --data $(DATA)/busy_train --val $(DATA)/busy_val \
	    --out $(@D) --resume

$(RUN)/eva02/model.safetensors: $(DATA)/busy_train/records.arrow $(DATA)/busy_val/records.arrow
	$(PY) train.py scenes-eva02 --data $(DATA)/busy_train --val $(DATA)/busy_val \
	    --out $(@D) --resume

$(RUN)/model.safetensors: $(DATA)/narrations_train/records.arrow \
    $(DATA)/narrations_val/records.arrow $(DATA)/regions_train/records.arrow
	$(MAKE) -j2 $(RUN)/sam/model.safetensors $(RUN)/eva02/model.safetensors
	$(PY) train.py scenes-tiny --data $(DATA)/narrations_train $(DATA)/regions_train \
	    --val $(DATA)/narrations_val --start.sam $(RUN)/sam --start.eva02 $(RUN)/eva02 \
	    --cache-features $(RUN)/cache --out $(RUN) --resume

$(RUN)/eval/trace.json: $(RUN)/model.safetensors
	$(PY) eval.py $(RUN) --task trace --data $(DATA)/narrations_val

$(RUN)/gallery.html: $(RUN)/eval/trace.json
	$(PY) -m pixelllm.cli caption $$(ls $(DATA)/scenes/val/*.jpg | head -n 60) \
	    --model $(RUN) --html $@ --json > $(RUN)/captions.jsonl

# The larger recipes share 40,000 scenes and the quickstart's SAM, EVA02 and cache of features.
BIG := runs/scenes
ANNOTATIONS := $(BIG)/scenes/annotations
CACHE := --cache-features $(RUN)/cache --resume

$(BIG)/scenes/scenes.json: | .venv/installed
	$(PY) -m data.scenes $(BIG)/scenes --train 40000 --val 500 --seed 0

$(BIG)/narrations_%/records.arrow: $(BIG)/scenes/scenes.json
	$(PY) -m data.localized_narratives --images $(BIG)/scenes --out $(@D) \
	    $(ANNOTATIONS)/scenes_$*_localized_narratives.jsonl

$(BIG)/objects_%/records.arrow: $(BIG)/scenes/scenes.json
	$(PY) -m data.coco $(ANNOTATIONS)/instances_$*.json --images $(BIG)/scenes/$* --out $(@D)

$(BIG)/regions_%/records.arrow: $(BIG)/scenes/scenes.json
	$(PY) -m data.visual_genome $(ANNOTATIONS)/visual_genome/$*.json \
	    --images $(BIG)/scenes/$* --out $(@D)

$(BIG)/referring_%/records.arrow: $(BIG)/scenes/scenes.json
	$(PY) -m data.refcoco "$(ANNOTATIONS)/refer/refs(unc).p" $(ANNOTATIONS)/refer/instances.json \
	    --images $(BIG)/scenes/$* --split $* --out $(@D)

$(BIG)/attributes_%/records.arrow: $(BIG)/scenes/scenes.json
	$(PY) -m data.refcoco "$(ANNOTATIONS)/refer/refs(unc).p" $(ANNOTATIONS)/refer/instances.json \
	    --images $(BIG)/scenes/$* --split $* --matching "* object" "* thing" --out $(@D)

runs/small/model.safetensors: $(BIG)/narrations_train/records.arrow \
    $(BIG)/narrations_val/records.arrow $(BIG)/regions_train/records.arrow \
    $(RUN)/sam/model.safetensors $(RUN)/eva02/model.safetensors
	$(PY) train.py scenes-small --data $(BIG)/narrations_train $(BIG)/regions_train \
	    --val $(BIG)/narrations_val --start.sam $(RUN)/sam --start.eva02 $(RUN)/eva02 \
	    --out $(@D) $(CACHE)

small: runs/small/model.safetensors
	$(PY) eval.py runs/small --task trace --data $(BIG)/narrations_val

JOINT_TABLES := narrations regions referring kinds attributes
# Two processes with a thread each are the best use of two cores.
TWICE := $(PY) -m torch.distributed.run --nproc-per-node 2 train.py
HALVES := --train.accumulate 2 --train.threads 1 $(CACHE)

runs/joint/model.safetensors: runs/small/model.safetensors \
    $(foreach t,$(JOINT_TABLES),$(BIG)/$(t)_train/records.arrow $(BIG)/$(t)_val/records.arrow)
	$(TWICE) scenes-joint --data $(JOINT_TABLES:%=$(BIG)/%_train) \
	    --val $(JOINT_TABLES:%=$(BIG)/%_val) --start.run runs/small --start.sam $(RUN)/sam \
	    --out $(@D) $(HALVES)

runs/joint-long/model.safetensors: runs/joint/model.safetensors
	$(TWICE) scenes-joint-long --data $(JOINT_TABLES:%=$(BIG)/%_train) \
	    --val $(JOINT_TABLES:%=$(BIG)/%_val) --start.run runs/joint --start.sam $(RUN)/sam \
	    --out $(@D) $(HALVES)

MASKED := runs/joint-refseg/model.safetensors runs/joint-long-refseg/model.safetensors

$(MASKED): runs/%-refseg/model.safetensors: runs/%/model.safetensors
	$(TWICE) scenes-$*-refseg --data $(BIG)/referring_train --val $(BIG)/referring_val \
	    --start.run $(<D) --start.sam $(RUN)/sam --out $(@D) $(HALVES)

define SCORE_ALL
$(PY) eval.py $(<D) --task trace --data $(BIG)/narrations_val
$(PY) eval.py $(<D) --task segmentation --data $(BIG)/referring_val
$(PY) eval.py $(<D) --task region --data $(BIG)/regions_val
$(PY) eval.py $(<D) --task dense --data $(BIG)/regions_val
endef

joint: runs/joint-refseg/model.safetensors
	$(SCORE_ALL)

joint-long: runs/joint-long-refseg/model.safetensors
	$(SCORE_ALL)

NAME_TABLES := referring kinds attributes

runs/scenes-ref/model.safetensors: runs/small/model.safetensors \
    $(foreach t,$(NAME_TABLES),$(BIG)/$(t)_train/records.arrow $(BIG)/$(t)_val/records.arrow)
	$(PY) train.py scenes-ref --data $(NAME_TABLES:%=$(BIG)/%_train) \
	    --val $(NAME_TABLES:%=$(BIG)/%_val) --start.run runs/small --out $(@D) $(CACHE)

runs/scenes-refseg/model.safetensors: runs/scenes-ref/model.safetensors
	$(PY) train.py scenes-refseg --data $(BIG)/referring_train --val $(BIG)/referring_val \
	    --start.run runs/scenes-ref --out $(@D) $(CACHE)

ref: runs/scenes-refseg/model.safetensors
	$(PY) eval.py $(<D) --task segmentation --data $(BIG)/referring_val

$(BIG)/named_%/records.arrow: $(BIG)/scenes/scenes.json
	$(PY) -m data.visual_genome $(ANNOTATIONS)/visual_genome/$*.json --expressions \
	    --images $(BIG)/scenes/$* --out $(@D)

$(BIG)/kinds_%/records.arrow: $(BIG)/scenes/scenes.json
	$(PY) -m data.coco $(ANNOTATIONS)/instances_$*.json --expressions supercategory \
	    --images $(BIG)/scenes/$* --out $(@D)

$(BIG)/grounded_%/records.arrow: $(BIG)/scenes/scenes.json
	$(PY) -m data.flickr30k $(ANNOTATIONS)/flickr30k/annotations.zip \
	    --split $(ANNOTATIONS)/flickr30k/$*.txt --images $(BIG)/scenes/$* --out $(@D)

$(BIG)/questions_%/records.arrow: $(BIG)/scenes/scenes.json
	$(PY) -m data.llava $(ANNOTATIONS)/llava_$*.json --images $(BIG)/scenes --out $(@D)

runs/scenes-clip/model.safetensors: $(BIG)/objects_train/records.arrow \
    $(BIG)/objects_val/records.arrow
	$(PY) train.py scenes-clip --data $(BIG)/objects_train --val $(BIG)/objects_val \
	    --out $(@D) --resume

CHAT_TABLES := referring named kinds grounded questions

runs/perceptiongpt/model.safetensors: runs/scenes-clip/model.safetensors \
    $(foreach t,$(CHAT_TABLES),$(BIG)/$(t)_train/records.arrow $(BIG)/$(t)_val/records.arrow)
	$(PY) train.py scenes-perceptiongpt --data $(CHAT_TABLES:%=$(BIG)/%_train) \
	    --val $(CHAT_TABLES:%=$(BIG)/%_val) --start.clip runs/scenes-clip --out $(@D) --resume

perceptiongpt: runs/perceptiongpt/model.safetensors
	$(PY) eval.py $(<D) --task segmentation --data $(BIG)/referring_val
	$(PY) eval.py $(<D) --task region --data $(BIG)/named_val
	$(PY) eval.py $(<D) --task grounded --data $(BIG)/grounded_val
	$(PY) eval.py $(<D) --task vqa --data $(BIG)/questions_val

$(BIG)/captions_%/records.arrow: $(BIG)/scenes/scenes.json
	$(PY) -m data.coco $(ANNOTATIONS)/captions_$*.json --images $(BIG)/scenes/$* --out $(@D)

$(BIG)/talks_%/records.arrow: $(BIG)/scenes/scenes.json
	$(PY) -m data.llava $(ANNOTATIONS)/talks_$*.json --images $(BIG)/scenes --out $(@D)

$(BIG)/pointed_%/records.arrow: $(BIG)/scenes/scenes.json
	$(PY) -m data.shikra $(ANNOTATIONS)/shikra_$*.jsonl --images $(BIG)/scenes --out $(@D)

ALL_TABLES := referring named grounded questions captions talks pointed

runs/perceptiongpt-all/model.safetensors: runs/perceptiongpt/model.safetensors \
    $(foreach t,$(ALL_TABLES),$(BIG)/$(t)_train/records.arrow $(BIG)/$(t)_val/records.arrow)
	$(PY) train.py scenes-perceptiongpt-all --data $(ALL_TABLES:%=$(BIG)/%_train) \
	    --val $(ALL_TABLES:%=$(BIG)/%_val) --start.run runs/perceptiongpt --out $(@D) --resume

perceptiongpt-all: runs/perceptiongpt-all/model.safetensors
	$(PY) eval.py $(<D) --task pointed --data $(BIG)/pointed_val
	$(PY) eval.py $(<D) --task vqa --data $(BIG)/talks_val --in-turn
	$(PY) eval.py $(<D) --task caption --data $(BIG)/captions_val

clean:
	rm -rf $(RUN)
