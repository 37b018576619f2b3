# make demo    train, evaluate and plot a tiny model in minutes          (no GPU needed)
# make test    side by side on two cores: lint, types, the CPU tests, the processors beside torchvision, the
#              kernels interpreted and compiled, the documentation, and the paper's claim on models that are
#              trained for it in three minutes (no GPU needed)
# make test-release    the same with all tests: those marked `release`, every combination of the interpreted
#              kernels' cases, more random records (see tests/selection.py; no GPU needed)
# make aot     every kernel and shipped configuration compiled, for every dtype; make test: bfloat16 alone
# make test-ptx        every kernel's PTX, executed on the CPU: results, races, counts (no GPU needed)
# make test-versions   the quick tests on the oldest and the newest releases that the package admits
#              (minutes; downloads some GB of CUDA builds of torch, no GPU needed)
# make test-vllm       the tests of tokenflex.serving.vllm beside a real vLLM, for CPUs
#              (minutes; downloads 1 GB into an environment of its own, no GPU needed)
# make test-play       the playground's page, with gradio in a headless Chromium (Debian's chromium; downloads
#              0.2 GB, no GPU needed)
# make docs    the documentation's site, into build/site; a warning is an error (no GPU needed)
# make test-openvino   the tests of exported graphs in OpenVINO, which they install (no GPU needed)
# make gpu     build with CUDA into $(PYTHON), run every kernel, the GPU tests, the tuner and the benchmarks
#              within BUDGET=540 seconds; another call continues (offline)
# make tune    measure kernel configurations on this machine's GPU, write the table into OUT; another
#              call continues, TUNE_SECONDS=200 limits it
# make sanitize        the extension under AddressSanitizer and UndefinedBehaviorSanitizer (no GPU needed)
# make sanitize-threads  its threads under ThreadSanitizer (no GPU needed)
# make sanitize-gpu    the GPU tests of packing under compute-sanitizer, where that is installed
# make setup   the virtual environment alone

COMMA := ,
PYTHON ?= python3
OUT ?= runs/gpu
BIN := .venv/bin
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*)

.PHONY: demo test test-release test-cpu test-kernels test-aot aot test-ptx test-claim test-torchvision \
  test-vllm test-play test-openvino test-versions test-oldest test-newest test-dropin-oldest test-newest-triton \
  lint setup docs \
  gpu tune sanitize sanitize-threads sanitize-gpu clean

setup: .venv/.ready

# The environment is rebuilt when what it is made from changed; an interrupted set-up starts over.
.venv/.ready: $(SOURCES)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/tokenflex train configs/demo.yaml
	@echo
	@echo 'Ask the model something:'
	@echo "  $(BIN)/tokenflex generate --model runs/demo/checkpoint --image examples/digits.png --prompt 'read r2c3' --tokens 4,9,16"

# Three parts at a time, the longest first: while one waits for processes or sockets, two cores have work.
test: setup
	$(MAKE) -j3 $(and $(filter output-sync,$(.FEATURES)),--output-sync=line) \
	  test-cpu test-folder-training test-folder-dropin test-kernels test-claim test-folder-models \
	  test-folder-kernels test-folder-serving lint test-torchvision test-aot docs

test-release:
	TOKENFLEX_TESTS=all $(MAKE) test

# The folders of tests that are parts of their own; test-cpu runs all others.
FOLDERS := dropin kernels models serving training
test-folder-%:
	$(BIN)/python -m pytest tests/$*

test-cpu:
	$(BIN)/python -m pytest $(addprefix --ignore tests/,$(FOLDERS))

KERNEL_TESTS := $(wildcard tests/kernels/test_kernels*.py tests/kernels/*/test_kernels*.py)
test-kernels:
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(KERNEL_TESTS)

test-aot:
	$(BIN)/python -m tokenflex_kernels.aot --quiet --quick

# Beside `make test`, which compiles for bfloat16 alone.
aot: setup
	$(BIN)/python -m tokenflex_kernels.aot --quiet
	$(BIN)/python -m tokenflex_kernels.aot --quiet --architectures gfx942,gfx950

# `make test` executes a choice of these. Minutes for each architecture; a second run takes seconds,
# see tests/ptx/results.py.
PTX_ARCHITECTURES ?= sm_90 sm_80
test-ptx: setup $(addprefix test-ptx-,$(PTX_ARCHITECTURES))
	$(BIN)/python -m tests.ptx.page
test-ptx-%:
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.ptx --architectures $* --out docs/results/ptx/$*.csv

# transformers has image processors of two kinds, and takes torchvision's where that is installed.
# Installed without the torch that it wants, and in a folder of its own, so that all other tests run
# without it.
TORCHVISION := .venv-torchvision
test-torchvision: $(TORCHVISION)/.ready
	PYTHONPATH=$(TORCHVISION) $(BIN)/python -m pytest -m 'not slow and not gpu' \
	  -k 'not dropin or processor or collator' \
	  $(addprefix tests/models/test_,processing.py tiling.py ristretto.py vision.py) \
	  $(addprefix tests/data/test_,packing.py pictures.py steps.py) tests/dropin \
	  tests/evaluation/test_runner.py::test_a_report_says_what_resized_the_images

$(TORCHVISION)/.ready: .venv/.ready constraints/torchvision.txt
	rm -rf $(TORCHVISION)
	$(BIN)/python -m pip install --no-deps --target $(TORCHVISION) --requirement constraints/torchvision.txt
	touch $@

# The site's tools read the sources and import nothing: they need no other environment. The variable
# silences a notice that Material is maintained until May 2027, which would be printed in every run.
DOCS := .venv-docs
docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build

$(DOCS)/.ready: constraints/docs.txt
	rm -rf $(DOCS)
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --requirement $<
	touch $@

# Beside `make test`: in a folder of its own, as gradio wants an older Pillow.
PLAY := .venv-play
test-play: $(PLAY)/.ready
	PYTHONPATH=$(PLAY) $(BIN)/python -m pytest tests/serving/test_playground*.py

$(PLAY)/.ready: .venv/.ready constraints/play.txt
	rm -rf $(PLAY)
	$(BIN)/python -m pip install --target $(PLAY) --constraint constraints/play.txt 'gradio>=6,<7' playwright
	touch $@

# Beside `make test`, not in it: installed in a folder of its own.
OPENVINO := .venv-openvino
test-openvino: $(OPENVINO)/.ready
	PYTHONPATH=$(OPENVINO) nice $(BIN)/python -m pytest -k openvino tests/serving/test_export.py

$(OPENVINO)/.ready: .venv/.ready constraints/openvino.txt
	rm -rf $(OPENVINO)
	$(BIN)/python -m pip install --no-deps --target $(OPENVINO) --requirement constraints/openvino.txt
	touch $@

# On one core: the other one is busy with tests.
test-claim:
	rm -rf runs/test-claim
	$(BIN)/tokenflex ablate --quick --jobs 1 --output runs/test-claim
	$(BIN)/tokenflex ablate --quick --suite limited --jobs 1 --output runs/test-claim

# Beside `make test`, not in it: vLLM wants a transformers of its own, and is large. vLLM finds the
# entry point of the working tree in its egg-info. The tests run without the libraries for sound and
# images that vLLM brings, which may be built for another torch. The command `vllm` looks for metadata
# of "vllm", and its build for CPUs has another name.
VLLM := .venv-vllm
test-vllm: $(VLLM)/.ready
	$(VLLM)/bin/python setup.py -q egg_info
	PYTHONPATH=. VLLM_CPU_KVCACHE_SPACE=1 nice $(VLLM)/bin/python -m pytest --no-header \
	  tests/serving/test_feature_cache.py $(wildcard tests/serving/test_vllm*.py)

$(VLLM)/.ready: constraints/vllm.txt .venv/.ready
	rm -rf $(VLLM)
	$(PYTHON) -m venv $(VLLM)
	nice $(VLLM)/bin/python -m pip install --requirement $<
	$(VLLM)/bin/python -m pip uninstall --yes torchaudio torchcodec torchvision
	mkdir $(VLLM)/vllm-0.dist-info
	printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0+cpu\n' > $(VLLM)/vllm-0.dist-info/METADATA
	mv $(VLLM)/vllm-0.dist-info $(VLLM)/lib/python3*/site-packages
	touch $@

# Beside `make test`, not in it: each set has an environment of its own.
VERSIONS := .venv-versions
test-versions: setup
	@failed=0; \
	for set in oldest dropin-oldest newest newest-triton; do $(MAKE) test-$$set || failed=1; done; \
	exit $$failed

QUICK_TESTS := -m 'not slow and not gpu' --no-header -p no:cacheprovider
test-oldest test-newest: test-%: $(VERSIONS)/%/.ready
	TRITON_INTERPRET=1 nice $(VERSIONS)/$*/bin/python -m pytest $(QUICK_TESTS) $(KERNEL_TESTS)
	nice $(VERSIONS)/$*/bin/python -m pytest $(QUICK_TESTS) \
	  $(addprefix tests/,kernels models data training $(if $(filter newest,$*),dropin))

# The drop-in needs a later transformers than the rest.
test-dropin-oldest: $(VERSIONS)/oldest/.ready $(VERSIONS)/dropin/.ready
	PYTHONPATH=$(VERSIONS)/dropin nice $(VERSIONS)/oldest/bin/python -m pytest $(QUICK_TESTS) tests/dropin

$(VERSIONS)/oldest/.ready $(VERSIONS)/newest/.ready: $(VERSIONS)/%/.ready: constraints/%.txt pyproject.toml
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(PYTHON) constraints/requirements.py > $(@D)/requirements.txt
	nice $(@D)/bin/python -m pip install --constraint $< --requirement $(@D)/requirements.txt
	touch $@

$(VERSIONS)/dropin/.ready: constraints/dropin.txt $(VERSIONS)/oldest/.ready
	rm -rf $(@D)
	$(VERSIONS)/oldest/bin/python -m pip install --no-deps --target $(@D) --requirement $<
	touch $@

# The newest Triton, while no torch that goes with it installs here: it compiles, beside constraints.txt.
test-newest-triton: $(VERSIONS)/triton/.ready
	PYTHONPATH=$(VERSIONS)/triton nice $(BIN)/python -m tokenflex_kernels.aot --quiet --quick
	PYTHONPATH=$(VERSIONS)/triton nice $(BIN)/python -m pytest $(QUICK_TESTS) \
	  $(addprefix tests/kernels/,budget test_aot.py test_launch.py test_relaunch.py) tests/ptx/test_kernels.py

$(VERSIONS)/triton/.ready: constraints/triton.txt .venv/.ready
	rm -rf $(@D)
	$(BIN)/python -m pip install --no-deps --target $(@D) --requirement $<
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# For an environment that already has torch, triton, pybind11, ninja, setuptools, pytest and numpy; for
# all rows and pictures also matplotlib and transformers. Offline. Builds, runs every kernel once, tests,
# tunes and measures within BUDGET seconds; another call with the same OUT continues. Less than 300
# seconds do without tuning, and measure one case for each target.
BUDGET ?= 540
gpu:
	$(PYTHON) -m benchmarks.first_minutes --out "$(OUT)" --seconds $(BUDGET)

# Continues, too: OUT has every time that was measured.
tune:
	$(PYTHON) -m tokenflex_kernels.tune --table "$(OUT)/launch_configs.json" --csv "$(OUT)/tune.csv" \
	  $(and $(TUNE_SECONDS),--seconds $(TUNE_SECONDS))

# $(call sanitized,SANITIZERS,ENVIRONMENT,TESTS) builds the C++ half anew, runs tests on it, and builds it
# as it was.
define sanitized
	CXXFLAGS="-fsanitize=$(1) -fno-omit-frame-pointer" TOKENFLEX_CUDA=0 $(BIN)/python setup.py build_ext --inplace
	$(2) $(BIN)/python -m pytest -m 'not slow and not gpu' $(3); \
	status=$$?; $(BIN)/python setup.py build_ext --inplace; exit $$status
endef

runtime = $$(c++ -print-file-name=lib$(1).so)

sanitize: setup
	$(call sanitized,address$(COMMA)undefined -fno-sanitize-recover=undefined,\
	  LD_PRELOAD="$(call runtime,asan) $(call runtime,ubsan)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1,\
	  $(addprefix tests/kernels/test_,call_records.py extension.py huge_pages.py threads.py) \
	  $(addsuffix /test_native.py,$(addprefix tests/kernels/,pool_norm swiglu project_tokens)) \
	  $(addprefix tests/kernels/packing/test_,plan.py packing.py table_gradient.py bins.py tensor_calls.py))

# ThreadSanitizer needs addresses that are little randomised, which not every Linux has.
sanitize-threads: setup
	$(call sanitized,thread,\
	  $(shell setarch -R true 2>/dev/null && echo setarch -R) env \
	  OMP_NUM_THREADS=1 LD_PRELOAD="$(call runtime,tsan)" TSAN_OPTIONS=halt_on_error=1,\
	  --capture=sys tests/kernels/test_threads.py)

# Its tools look at every access of every thread, which takes minutes: each has a time limit.
sanitize-gpu:
	@command -v compute-sanitizer >/dev/null || { echo 'make sanitize-gpu needs compute-sanitizer, of the CUDA toolkit'; exit 2; }
	@failed=0; \
	for tool in memcheck racecheck synccheck; do \
	  timeout 300 compute-sanitizer --tool $$tool --error-exitcode 1 $(PYTHON) -m pytest -q -m 'gpu and not slow' \
	    tests/kernels/packing/test_cuda.py -k 'values or strided or map_of_a_merge' || failed=1; \
	done; \
	exit $$failed

clean:
	rm -rf .venv $(TORCHVISION) $(VERSIONS) $(VLLM) $(PLAY) $(OPENVINO) $(DOCS) build *.egg-info tokenflex_kernels/*.so
