# Each target works from a fresh clone: what it needs, it makes first.
PYTHON ?= python3
VENV ?= .venv
DATA ?= data/builtin_sp4096
PY := $(VENV)/bin/python
SUITE := $(PY) -m pytest -q -n 2 --dist worksteal
VENV_H100 ?= .venv-h100
VENV_SITE ?= .venv-site
# make venv TORCH=cpu: torch without CUDA, 200 MB in place of 4.8 GB, from PyTorch's own index. Other systems than Linux
# have no CUDA build anyway.
TORCH ?=
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# With these set, as for installations outside of environments, pip would write elsewhere, or refuse.
override export PIP_USER := 0
unexport PIP_TARGET PIP_PREFIX
# FlashAttention 3 for CUDA 13 and any torch from 2.9 on (docs/gpus.md); empty: none.
FLASH_ATTENTION ?= https://download.pytorch.org/whl/cu130/flash_attn_3-3.0.0-cp39-abi3-manylinux_2_28_x86_64.whl

# Prints the folder of a usable CUDA build of torch. Where VENV or PYTHON has one, `make venv` keeps it.
CUDA_TORCH := import torch, pathlib; v = torch.__version__.split('.'); \
    assert torch.version.cuda and (int(v[0]), int(v[1])) >= (2, 9); print(pathlib.Path(torch.__file__).parent.parent)

.PHONY: demo data check check-h100 format test test-fast test-thorough test-gpu bench ablate lab forecast campaign mine audit-data pack reproduce prove publish sweep report watch docs venv venv-gpu clean first-hour fuzz site

# The whole pipeline in minutes on two cores: built-in text, training, quantization, artifact, score, two lines of it.
demo: venv
	@$(PY) data/prepare.py builtin --out $(DATA) --vocab-size 4096
	@run=$${RUN_ID:-$$(date +%Y%m%d-%H%M%S)-demo}; \
	    PRESET=demo DATA_PATH=$(DATA) RUN_ID=$$run $(PY) train_gpt.py && \
	    $(PY) tools/generate.py "$${ARTIFACT_DIR:-logs/$$run}" "The function returns" --lines 2

# Any data, the challenge's own too: make data ARGS="sp8192 --train-shards 10 --out data/sp8192"
data: $(VENV)/data-tools
	@$(PY) data/prepare.py $(ARGS)

# Your own texts: prepares them, trains, and writes a sample (README.md). A folder's name may hold blanks:
# make mine TEXTS="my texts" NAME=german MINUTES=10
# ARGS takes more: ARGS="--suffix .py --prompt 'def main'"
mine: $(if $(TEXTS),venv)
	@test -n "$$TEXTS" || { echo "error: TEXTS: is needed, such as: make mine TEXTS=\"my texts\" NAME=german" >&2; exit 2; }
	@$(PY) tools/mine.py "$$TEXTS" $(if $(NAME),--name "$$NAME") $(if $(MINUTES),--minutes "$$MINUTES") $(ARGS)

# The gates that run nothing: lint, format and types, at no findings. `make format` mends what can be mended by itself.
check: $(VENV)/check-tools $(VENV)/test-tools $(VENV)/tools $(VENV)/data-tools
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(PY)

# What can be known about an H100 without one: graphs, kernels, waits, costs (tools/h100/README.md). Needs torch's CUDA
# build and a C compiler, but no GPU. Skipped with a line where that build cannot be installed, unless H100_REQUIRED=1.
# At the record's sizes: make check-h100 ARGS="--full --out report"
check-h100:
	@mkdir -p $(VENV_H100)
	@if [ "$(H100_CACHED)" = 1 ] && [ ! -e $(VENV_H100)/installed ]; then \
	    echo "check-h100: SKIPPED: $(VENV_H100) is not installed; \`make check-h100\` installs it (3 GB)"; \
	elif $(MAKE) --no-print-directory $(VENV_H100)/installed >$(VENV_H100)/install.log 2>&1; then \
	    $(VENV_H100)/bin/python tools/h100/check.py --cache $(VENV_H100)/cache $(ARGS); \
	elif [ "$(H100_REQUIRED)" = 1 ]; then \
	    echo "error: check-h100: torch's CUDA build cannot be installed (see $(VENV_H100)/install.log)" >&2; exit 2; \
	else \
	    echo "check-h100: SKIPPED: torch's CUDA build cannot be installed (see $(VENV_H100)/install.log)"; \
	fi

$(VENV_H100)/installed: requirements-h100.txt
	@$(PYTHON) -m venv $(VENV_H100)
	@$(VENV_H100)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-h100.txt
	@$(VENV_H100)/bin/python -c "import sys, torch; sys.exit(torch.version.cuda is None)"
	@touch $@

format: $(VENV)/check-tools
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

test: $(VENV)/test-tools $(VENV)/tools $(VENV)/data-tools
	$(SUITE) -m "not thorough" tests

# The rest: further values, kills and mutations, and long ways, for before a release and in CI (tests/thorough.txt).
test-thorough: $(VENV)/test-tools $(VENV)/tools $(VENV)/data-tools
	$(SUITE) -m thorough tests

# Damages files that strangers write, and reads them with every tool: make fuzz ARGS="--minutes 10"
fuzz: $(VENV)/tools
	@$(PY) tools/fuzz.py $(ARGS)

# For the inner loop: without the tests that are marked slow.
test-fast: $(VENV)/test-tools $(VENV)/tools $(VENV)/data-tools
	$(SUITE) -m "not slow and not thorough" tests

# The same kernels and backends, for real, on a CUDA device; and training steps, Muon over NCCL, GPTQ and TTT at size.
test-gpu: $(VENV)/test-tools $(VENV)/tools $(VENV)/data-tools
	$(PY) -m pytest -q -rs -m gpu tests

# Tests, benchmarks and a short run on 1 to 8 GPUs, and one report: measured against estimated (docs/first-hour.md).
# Without a GPU, a rehearsal: make first-hour ARGS="--device cpu --tiny"
first-hour: $(VENV)/test-tools $(VENV)/tools $(VENV)/data-tools
	@$(PY) tools/first_hour.py $(ARGS)

# Each stage against a reference in the same run: kernels, a training step, the case transform, preparing, loading.
bench: venv
	@$(PY) data/prepare.py builtin --out $(DATA) --vocab-size 4096
	$(PY) bench/cpu_kernels.py
	$(PY) bench/train.py
	$(PY) bench/caseops_speed.py
	$(PY) bench/prepare_speed.py
	$(PY) bench/loader.py --data $(DATA)

# Kills, signals, lost ranks, full disks, damage and hostile files, seeded (docs/robustness.md):
# make campaign ARGS="--minutes 20 --seed 1 --report bench/results/campaign.md"
campaign: $(VENV)/tools $(VENV)/data-tools
	$(PY) bench/campaign.py $(ARGS)

# Every technique of both presets switched off in turn, three seeds each; goes on where it was stopped.
ablate: venv
	@$(PY) data/prepare.py builtin --out data/builtin_ablate --vocab-size 1024 --val-fraction 0.01
	$(PY) bench/ablate.py

# Each idea against the best recipe at three sizes, paired by seed; goes on where it was stopped (docs/lab-notes.md):
# make lab ARGS="--hours 4", or ARGS="--only NorMuon --seeds 42 0"
lab: venv
	@$(PY) bench/lab.py $(ARGS)

# The score to expect on 8 H100s, from what is committed under bench/results: docs/forecast.md, bench/results/forecast.json
forecast: venv
	@$(PY) bench/forecast.py $(ARGS)

# Checks shards, looks for validation text in the training shards, adds the result to manifest.json: make audit-data DATA=folder
audit-data: venv
	@if [ "$(origin DATA)" = file ]; then $(PY) data/prepare.py builtin --out $(DATA) --vocab-size 4096; fi
	@$(PY) tools/audit_data.py $(DATA)

# The script that ships: packed/train_gpt.py.
pack: venv
	$(PY) tools/pack_code.py

# Seeds 42, 0, 314 of a preset, and the submission's folder: PRESET=record DATA_PATH=... make reproduce ARGS="--nproc 8"
# Without PRESET and DATA_PATH: the demo, on the built-in text.
reproduce: $(VENV)/tools
	@if [ -z "$$PRESET$$DATA_PATH" ]; then \
	    $(PY) data/prepare.py builtin --out $(DATA) --vocab-size 4096 && export PRESET=demo DATA_PATH=$(DATA); fi && \
	    $(PY) tools/reproduce.py $(ARGS)

# Tries the rules on the packed script and a run's artifact: make prove FOLDER=logs/RUN ARGS=--short
prove: $(VENV)/tools
	$(PY) tools/prove.py $(FOLDER) $(ARGS)

# Shows a submission of `make reproduce` at the root: make publish FOLDER=submissions/demo-1a2b3c4d
publish: $(VENV)/tools
	$(PY) tools/publish.py $(FOLDER) --run --data $(DATA)
	$(PY) tools/docs.py

# make sweep ARGS="MATRIX_LR=0.02,0.026 SEED=42,0 -- python train_gpt.py"
sweep: $(VENV)/tools
	@$(PY) tools/sweep.py $(ARGS)

# Table and pictures of all runs in logs/, or of others: make report ARGS="logs/RUN peer.log --out report"
report: $(VENV)/tools
	@$(PY) tools/report.py $(if $(ARGS),$(ARGS),logs --out report)

# Draws the losses again while runs go on: make watch ARGS="logs/RUN --every 5"
watch: $(VENV)/tools
	@$(PY) tools/watch.py $(ARGS)

# What is generated in the documentation: the table of knobs, the results in README.md.
docs: venv
	@$(PY) tools/docs.py

# The documentation as a web site, in site/: make site ARGS="--serve 8000"
site: $(VENV_SITE)/installed
	@$(VENV_SITE)/bin/python tools/site_pages.py $(ARGS)

$(VENV_SITE)/installed: requirements-site.txt
	@$(PYTHON) -m venv $(VENV_SITE)
	@$(VENV_SITE)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-site.txt
	@touch $@

venv: $(VENV)/installed

# The environment for NVIDIA GPUs, FlashAttention 3 included (docs/gpus.md). The script runs without FlashAttention too.
venv-gpu: $(VENV)/gpu

$(VENV)/gpu: $(VENV)/installed requirements-gpu.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-gpu.txt
	@$(PY) -c "import sys, torch; sys.exit(torch.version.cuda is None)" || \
	    { echo "error: venv-gpu: the index serves a build of torch without CUDA" >&2; exit 2; }
	@if [ -z "$(FLASH_ATTENTION)" ] || \
	    $(PY) -m pip install --quiet --disable-pip-version-check --no-deps "$(FLASH_ATTENTION)"; then \
	    touch $@; \
	else \
	    echo "warning: venv-gpu: goes on without FlashAttention, with torch's own attention (docs/gpus.md)" >&2; \
	fi

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: PYTHON=$(PYTHON): must be Python 3.11 or newer" >&2; exit 2; }
	@case "$(TORCH)" in ""|cpu|cuda) ;; *) echo "error: TORCH=$(TORCH): must be cpu, cuda or empty" >&2; exit 2 ;; esac
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@test "$(TORCH)" != cpu || $(PY) -m pip install --quiet --disable-pip-version-check --no-deps \
	    --index-url $(TORCH_CPU_INDEX) "$$(grep '^torch==' requirements.txt)"
	@$(PY) -c "$(CUDA_TORCH)" >/dev/null 2>&1 || if [ "$(TORCH)" != cpu ] && folder=$$($(PYTHON) -c "$(CUDA_TORCH)" 2>/dev/null); then \
	    echo "$$folder" >"$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch-of-python.pth"; fi
	@if $(PY) -c "$(CUDA_TORCH)" >/dev/null 2>&1; then \
	    echo "keeping the CUDA build of torch that is there"; grep -v '^torch==' requirements.txt >$(VENV)/requirements.txt; \
	else cp requirements.txt $(VENV)/requirements.txt; fi
	$(PY) -m pip install --quiet --disable-pip-version-check -r $(VENV)/requirements.txt
	@touch $@

$(VENV)/test-tools: $(VENV)/installed requirements-test.txt
	@$(PY) -c "import triton" 2>/dev/null || \
	    $(PY) -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	@touch $@

$(VENV)/check-tools: $(VENV)/installed requirements-check.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-check.txt
	@touch $@

$(VENV)/tools: $(VENV)/installed requirements-tools.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-tools.txt
	@touch $@

$(VENV)/data-tools: $(VENV)/installed requirements-data.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-data.txt
	@touch $@

clean:
	rm -rf $(VENV) $(VENV_H100) $(VENV_SITE) .pytest_cache .hypothesis .ruff_cache
