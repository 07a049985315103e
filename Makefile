# Everything runs from a clean clone: each target makes its own environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two OpenMP threads on a busy box can be ten times slower than one.
export OMP_NUM_THREADS ?= 1
JOBS ?= 2

.PHONY: readme demo test test-all lab install export clean-nbs lint nnunet
$(VENV)/.stamp: requirements.lock settings.ini setup.py
	$(PYTHON) -m venv $(VENV)
	@# torch first and exactly: a range asked of an empty environment brings gigabytes of CUDA. A torch that is there already (a GPU build, say) stays.
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q "$$(grep '^torch==' requirements.lock)"
	$(BIN)/pip install -q -r requirements.lock
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	@touch $@
install: $(VENV)/.stamp

# nnU-Net's own package, which sees everything in $(VENV) and changes nothing there.
NN := .venv-nnunet
$(NN)/.stamp: $(VENV)/.stamp requirements-nnunet.lock
	$(PYTHON) -m venv $(NN)
	$(NN)/bin/pip install -q --no-deps -r requirements-nnunet.lock
	$(NN)/bin/python -c "import sysconfig, pathlib, sys; pathlib.Path(sysconfig.get_paths()['purelib'], 'tested_set.pth').write_text('import site; site.addsitedir(' + repr(sys.argv[1]) + ')\n')" "$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")"
	@touch $@
nnunet: $(NN)/.stamp

demo: install
	OMP_NUM_THREADS=2 $(BIN)/medssl demo

test: install
	$(BIN)/python -m pytest -n $(JOBS)

test-all: install nnunet
	MEDSSL_SLOW=1 $(BIN)/python -m pytest -n $(JOBS)
	MEDSSL_SLOW=1 $(NN)/bin/python -m pytest -n 0 tests/test_export.py

lab: install
	$(BIN)/jupyter lab --notebook-dir=nbs

export: install
	$(BIN)/nbdev_export && $(BIN)/nbdev_clean

lint: install
	$(BIN)/ruff check medssl_nb tests benchmarks experiments

readme: install
	$(BIN)/jupyter nbconvert --to markdown --output-dir . --output README nbs/index.ipynb
	$(BIN)/python -c "import re,pathlib as p; f=p.Path('README.md'); s=f.read_text(); f.write_text(re.sub(r'\`\`\`(?:python)?\n%matplotlib.*?\`\`\`\n', '', s, flags=re.S).replace('![png](', '![a synthetic patient in four contrasts](').strip()+'\n')"
