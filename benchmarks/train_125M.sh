#!/bin/sh
# swa_gdn2_125M on the GPU in bf16 and on the CPU in fp32, from the same seed on the same batches: do the losses fall alike?
# Usage: benchmarks/train_125M.sh CORPUS OUTPUT [GPU_STEPS] [CPU_STEPS]      the corpus: prepare_data.py --train_tokenizer 32000
set -eu
corpus=$1 output=$2 gpu_steps=${3:-300} cpu_steps=${4:-30}
common="--train_data_dir $corpus --output_root $output --model_name swa_gdn2_125M --train_config debug --sequences_per_batch 4
    --sequence_length 1024 --learning_rate 5e-4 --warmup_tokens 81920 --total_tokens $((gpu_steps * 4096)) --log_step_interval 1
    --eval_iters 1 --eval_step_interval 100 --interactive_job --document_reset false"
python pretrain.py $common --exp_name cpu --accelerator cpu --micro_batch_size 4 --save_step_interval $cpu_steps \
    > "$output/cpu.log" 2>&1 &
cpu=$!
python pretrain.py $common --exp_name gpu --accelerator cuda --micro_batch_size 4 --save_step_interval $gpu_steps
while kill -0 $cpu 2>/dev/null && ! grep -q "checkpoint step" "$output/cpu.log"; do sleep 1; done
kill $cpu 2>/dev/null || true
python benchmarks/compare_losses.py "$output/outputs/debug_cpu" "$output/outputs/debug_gpu" --out "$output/loss.png"
