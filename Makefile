# Every target sets itself up in .venv (test-lowest and test-newest beside it) from a fresh clone and is quick when repeated.
PYTHON ?= python3
BIN := .venv/bin
EXAMPLE = "$$($(BIN)/python -c 'import iclip_hf; print(iclip_hf.example_image())')"
EXPLAIN = $(BIN)/iclip explain $(EXAMPLE) --text $(TEXTS)
# What the picture of the README shows.
TEXTS := "tower, tree, sky, horse"

.PHONY: demo test test-slow test-lowest test-newest test-kernels test-sse4 test-avx2 test-avx512 test-transformers style docs pictures bench

# `pip install '.[demo]'` in .venv puts a copy in place of the editable install, which is then made again.
ifeq ($(wildcard .venv/lib/python*/site-packages/__editable__*iclip_hf*),)
.PHONY: .venv/.package
endif

# The package alone, with the `iclip` command.
.venv/.package: setup.py pyproject.toml
	@echo "Installing the package into .venv, about 1 GB (more with CUDA), which takes some minutes."
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --editable .
	touch $@

# With all extras and what the tests need.
.venv/.installed: .venv/.package
	@echo "Installing all extras and what the tests need, 2 GB in all (more with CUDA)."
	$(BIN)/python -m pip install --editable '.[dev]'
	touch $@

# Explains the photograph of the package with the embedded model: the picture that the README shows.
demo: .venv/.package
	$(EXPLAIN) --output "$(CURDIR)/demo.jpg"

# The pictures of the README and of the methods, and the outputs of the notebook, made anew, as after a change of the embedded model.
METHODS := itsm competing_itsm reversed_itsm attention attention_affinity grad_cam legrad clip_surgery gem maskclip sclip
METHODS += clearclip naclip proxyclip
pictures: .venv/.installed
	$(EXPLAIN) --output docs/demo.jpg
	$(BIN)/iclip compare $(EXAMPLE) --text tower --methods $(METHODS) --output docs/methods.jpg
	$(BIN)/iclip explain $(EXAMPLE) --text "a tower behind trees under the sky" --words --output docs/words.jpg
	sed -n '/^```python$$/,/^```$$/{/^```/!p}' README.md | (cd docs && $(CURDIR)/$(BIN)/python -)
	$(BIN)/python notebooks/execute.py

# A test process for each core; a file's tests stay together, because they share models and browsers.
PYTEST := -m pytest -n auto --dist loadfile -p no:randomly
test test-slow test-lowest test-newest: export OMP_NUM_THREADS = 1

# `make test` leaves out the tests marked `slow`, which `make test-slow` runs.
test: SELECTED := not slow
test-slow: SELECTED := slow
test test-slow: .venv/.installed
	$(BIN)/python $(PYTEST) -m "$(SELECTED)"

# Both with the lowest versions that setup.py allows, on the lowest Python, and with the newest on any:
# `make test-lowest PYTHON=python3.10`.
test-lowest: RESOLUTION := lowest-direct
test-newest: RESOLUTION := highest
test-lowest test-newest: test-%:
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip install --quiet uv
	.venv-$*/bin/uv pip install --quiet --python .venv-$*/bin/python --resolution $(RESOLUTION) --editable '.[dev]'
	.venv-$*/bin/python $(PYTEST)

# The tests that compare numbers, on other kernels and threads than the processor's own, in random order: no result may depend on
# rounding.
NUMBERS := similarity pooling finite losses label_maps presence refinement regions modeling engine explainers explainer_methods
NUMBERS += analysis metrics faithfulness tasks
test-sse4: export MKL_ENABLE_INSTRUCTIONS = SSE4_2
test-sse4: export ATEN_CPU_CAPABILITY = default
test-sse4: export OMP_NUM_THREADS = 1
test-avx2: export MKL_ENABLE_INSTRUCTIONS = AVX2
test-avx2: export ATEN_CPU_CAPABILITY = avx2
test-avx2: export OMP_NUM_THREADS = 2
test-avx512: export MKL_ENABLE_INSTRUCTIONS = AVX512
test-avx512: export OMP_NUM_THREADS = 4
test-kernels: test-sse4 test-avx2 test-avx512
test-sse4 test-avx2 test-avx512: .venv/.installed
	$(BIN)/python -m pip install --quiet pytest-randomly
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow" $(NUMBERS:%=tests/test_%.py)

# Transformers' own common tests, on every pair of towers, or on those that TOWERS selects. They come from its source distribution
# and stay in runs/.
test-transformers: .venv/.installed
	$(BIN)/python -m pip install --quiet parameterized
	$(BIN)/python -m pytest --disable-warnings $(if $(TOWERS),-k "$(TOWERS)") tests/transformers_common.py

# Transformers' rules for model files, without those for its own repository (licence header, docstring decorator, checkpoints named
# beside each branch), without that against nn.Sequential, since the weights of hidden layers are published under its names, and without
# two that take correct code for an error: trust_remote_code=False, which refuses code, and a comparison of the attention's name, which
# tells whether the class token's attention is returned.
HOUSE_RULES := TRF028|TRF057|TRF041|TRF014|TRF051|TRF036
style: .venv/.installed
	! git grep -nE '^ *(<{7}|>{7}) '  # what a merge left
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	sed -E '/^\[rules\.($(HOUSE_RULES))\]/,/^default_enabled/s/= true/= false/' \
		"$$($(BIN)/python -c 'import mlinter; print(mlinter.__path__[0])')/rules.toml" > .venv/mlinter.toml
	$(BIN)/mlinter --no-cache --no-progress --rules-toml .venv/mlinter.toml src/iclip_hf

# The pages, in site/. A warning, such as a link without a target, is an error.
docs: .venv/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The tables of docs/speed.md, and others in runs/: about 20 minutes on two idle cores. ICLIP_DATA is the folder of the data sets.
SPEED := bench_explain bench_explainers bench_training
bench: .venv/.installed
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	mkdir -p runs
	for script in benchmarks/bench_*.py; do \
		table=runs/$$(basename $$script .py).md; \
		$(BIN)/python $$script > $$table && cat $$table && echo || exit 1; \
	done
	$(BIN)/python benchmarks/insert.py docs/speed.md $(SPEED:%=runs/%.md)
