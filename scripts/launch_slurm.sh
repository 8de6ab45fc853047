#!/bin/bash
#SBATCH --job-name=pretrain
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#
# Pretraining under Slurm: whole nodes, one task for each GPU. From the root of the repository:
#
#     sbatch --nodes=2 scripts/launch_slurm.sh --train_data_dir D --output_root O --exp_name N \
#         --model_name swa_gdn2_1.3B --train_config tsz128x4k_100B
#
# What follows the script are flags of pretrain.py. Options before it override the lines above, as on
#     nodes of 4 GPUs:      sbatch --gpus-per-node=4 --ntasks-per-node=4 ...
#     nodes without GPUs:   sbatch --gpus-per-node=0 --ntasks-per-node=1 --cpus-per-task=16 ...
#
# Five minutes before the limit (--signal) the tasks save and leave with exit code 75, and the job requeues itself; so it
# does when a task is killed or fails. A job whose node fails is requeued by Slurm (--requeue), unless its tasks notice
# first. Each time it goes on where its newest checkpoint is. What each node prints is in slurm-<job>/. Settings of NCCL
# and InfiniBand are the site's: they pass through from your environment.

set -uo pipefail

# An image to run in: empty for none, a .sif file for apptainer, anything else for srun's --container-image (pyxis).
CONTAINER=${CONTAINER:-}
# Folders that the container needs besides this one, with data and runs, as /a,/b.
CONTAINER_MOUNTS=${CONTAINER_MOUNTS:-}
# How often in a row a job whose tasks fail is queued again; never for an error of the user's (exit code 2).
MAX_RESTARTS=${MAX_RESTARTS:-3}
# The interpreter; by default that of .venv, in a container the image's own.
PYTHON=${PYTHON:-$([ -z "$CONTAINER" ] && [ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}

say() {
    echo "$(date '+%F %T') $*"
}
refuse() {
    echo "error: $*" >&2
    exit 2
}

[ -n "${SLURM_JOB_ID:-}" ] || refuse "this is a batch script: sbatch --nodes=2 scripts/launch_slurm.sh <flags of pretrain.py>"
[ -f pretrain.py ] || refuse "no pretrain.py in $PWD: submit from the root of the repository, or with sbatch --chdir."
tasks=${SLURM_NTASKS_PER_NODE:-1}
gpus=${SLURM_GPUS_ON_NODE:-0}
[[ $MAX_RESTARTS =~ ^[0-9]+$ ]] || refuse "MAX_RESTARTS should be a number, not '$MAX_RESTARTS'."
[ "$gpus" = 0 ] || [ "$gpus" = "$tasks" ] ||
    refuse "$tasks tasks on a node of $gpus GPUs: give --ntasks-per-node and --gpus-per-node the same number."

step=(--cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --wait=120) # 120 s after the first task has ended, all have to
[ "$gpus" = 0 ] || step+=(--gpu-bind=none)                    # each task sees all GPUs and takes the one of its rank
task=("$PYTHON" pretrain.py --nnodes "$SLURM_JOB_NUM_NODES" --devices "$tasks" "$@")
mounts=$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
case $CONTAINER in
"") ;;
*.sif)
    apptainer=(apptainer exec --bind "$mounts" --pwd "$PWD")
    [ "$gpus" = 0 ] || apptainer+=(--nv)
    task=("${apptainer[@]}" "$CONTAINER" "${task[@]}")
    ;;
*)
    binds=$(sed -E 's|([^,]+)|\1:\1|g' <<<"$mounts")
    step+=(--container-image="$CONTAINER" --container-mounts="$binds" --container-workdir="$PWD")
    ;;
esac

# Ranks meet at the address by which Slurm reaches the first node. Slurm leaves it to srun's caller to limit threads.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node --oneliner "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
export MASTER_ADDR OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

logs=slurm-$SLURM_JOB_ID
mkdir -p "$logs"
say "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_JOB_NUM_NODES nodes" \
    "($SLURM_JOB_NODELIST) x $tasks tasks; their output: $logs/node*.log"

trap : TERM INT USR1 # a signal for the whole job reaches this shell too, which has to outlive its tasks
srun "${step[@]}" --output="$logs/node%2n-%N.log" --open-mode=append "${task[@]}"
code=$?

again() { # what happened
    local state
    state=$(scontrol show job --oneliner "$SLURM_JOB_ID" | grep -o 'JobState=[A-Z_]*' | cut -d= -f2)
    if [ "$state" != RUNNING ]; then # Slurm is ending it: scancel, or the limit itself
        say "$1, ended by Slurm: submit the same command again to go on."
    elif scontrol requeue "$SLURM_JOB_ID"; then
        say "$1: job $SLURM_JOB_ID is queued again, to go on from its newest checkpoint."
    else
        say "$1, and could not be queued again: submit the same command to go on."
    fi
}
failures=$logs/failures # one line for each in a row
case $code in
0) say "finished." ;;
2) say "failed with exit code 2: see $logs/." ;;
75) rm -f "$failures" && again "left early" ;;
*)
    say "failed with exit code $code: see $logs/." | tee -a "$failures"
    if [ "$(wc -l <"$failures")" -le "$MAX_RESTARTS" ]; then
        again "failed"
    else
        say "failed $((MAX_RESTARTS + 1)) times in a row: mend that, and submit the same command to go on."
    fi
    ;;
esac
exit $code
