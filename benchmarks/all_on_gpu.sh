#!/bin/sh
# Everything that only a GPU can show, on this machine's: about half an hour beside fla-core, whose autotuning takes most of it.
# Usage: benchmarks/all_on_gpu.sh OUTPUT [TEXTS]      TEXTS: a folder of text to train on; default: this Python's library
set -eu
output=$1 texts=${2:-$(python -c "import sysconfig; print(sysconfig.get_paths()['stdlib'])")}
mkdir -p "$output"

python -m pytest -m "gpu or not slow" tests/ops tests/mixers
python benchmarks/gdn2_cases.py --out "$output/cases.json"
python benchmarks/gdn2_kernels.py --shapes 4x4096x16 1x16384x16 8x2048x16 2x16384x32 --packed 16384x16 \
    --out "$output/kernels.json" --picture "$output/roofline.png"
python benchmarks/gdn2_accuracy.py --shape 1x1024x16 --out "$output/accuracy.json"
python benchmarks/gdn2_decode.py
python benchmarks/gdn2_neighbours.py

python scripts/prepare_data.py --source "$texts" --exclude site-packages,dist-packages --train_tokenizer 32000 \
    --out "$output/corpus"
python benchmarks/train_fused_and_plain.py "$output/corpus" "$output/train" --steps 500
python benchmarks/compile_cache.py --out "$output/compile_cache.json"
python benchmarks/checkpoint_stall.py --model_name swa_gdn2_125M --sequences 64 --length 4096 --folder "$output"
