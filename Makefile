# make demo        .venv, requirements, then the three scripts on embedded synthetic faces
# make test        .venv, requirements, linter and tests (minutes)
# make test-slow   the kill loops and other long tests
# make pictures    README's pictures, from what the demo made
# make readme      README's tables of results, from results/*.csv
# make weights     train the weights that ship with the repo once more, from PHOTOS=train-faces.zip
# make clean-demo  forget what the demo made, so that it starts afresh

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow pictures readme weights clean-demo

demo: .venv/installed
	$(BIN)/python pre_process.py
	$(BIN)/python train.py
	$(BIN)/python lfw_eval.py

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -m "not slow"

test-slow: .venv/installed-dev
	$(BIN)/python -m pytest -m slow

pictures: .venv/installed
	$(BIN)/python pictures.py

readme: .venv/installed
	$(BIN)/python readme_tables.py

# About two hours on 2 cores. Stopped, it goes on where it was; what was trained lies in runs/cpu/export.
weights: .venv/installed
	@test -n "$(PHOTOS)" || { echo "error: make weights PHOTOS=path/to/train-faces.zip" >&2; exit 2; }
	$(BIN)/python pre_process.py --src "$(PHOTOS)" --out data/faces
	$(BIN)/python train.py --data data/faces --recipe cpu $(if $(wildcard runs/cpu/last.pt runs/cpu/previous.pt),--resume)
	@if [ -f data/lfw/pairs.txt ] && [ -f data/lfw/manifest.csv ]; then $(BIN)/python lfw_eval.py --data data/lfw --model runs/cpu; \
	  else echo "LFW or its pairs.txt is not in data/lfw: no figure is taken (README, On real photos)"; fi
	@cd runs/cpu && if [ -f export/recipe-cpu.md ]; then mv --backup=numbered export/recipe-cpu.md export/earlier-card.md; fi
	$(BIN)/python export_onnx.py --model runs/cpu --half --name recipe-cpu

clean-demo:
	rm -rf data/synthetic runs/demo

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: Python >= 3.11 is needed: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/installed: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install -q -r requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	@touch $@
