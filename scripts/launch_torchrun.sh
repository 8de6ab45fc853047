#!/bin/bash
# Pretraining under torchrun, on one node or several. Flags of this script come first, the rest goes to pretrain.py:
#
#     scripts/launch_torchrun.sh [flags below] --train_data_dir D --output_root O --exp_name N \
#         --model_name swa_gdn2_1.3B --train_config tsz128x4k_100B
#
#     --nproc_per_node P   processes here, one for each GPU; default: the GPUs of this machine, or 1
#     --nnodes N           machines; run this script, with the same flags, on each; default 1
#     --rdzv_endpoint H:P  where they meet: one of them, and a free port there; needed with --nnodes
#     --rdzv_id NAME       tells runs apart that meet at one endpoint; default pretrain
#     --node_rank R        0 on the machine of the endpoint, anything else elsewhere; needed only where a machine does
#                          not know its own address. Ranks are given out by the rendezvous.
#     --max_restarts M     how often workers that fail are started again on all nodes, to go on where the newest
#                          checkpoint is; default 3
#     --restart            go on by itself after leaving early for another reason than a signal to this script (such as
#                          a time limit), and after a failure of torchrun itself, until the run is finished
#
# Exit codes: 0 finished; 75 left early with everything saved: run the same command to go on; 2 an error of the user's;
# else a failure. SIGTERM, SIGINT and SIGUSR1 to this script reach each worker here once, and SIGHUP as SIGTERM: they
# save and leave. A second signal ends them at once. (torchrun alone would kill them 30 seconds after the first.)

set -uo pipefail

refuse() {
    echo "error: $*" >&2
    exit 2
}

nnodes=1 nproc='' endpoint='' id=pretrain node_rank='' max_restarts=3 restart=''
while [ $# -gt 0 ]; do
    case $1 in
    --restart) restart=yes && shift && continue ;;
    --nnodes | --nproc_per_node | --rdzv_endpoint | --rdzv_id | --node_rank | --max_restarts) ;;
    *) break ;;
    esac
    [ $# -gt 1 ] || refuse "$1 needs a value."
    case $1 in
    --nnodes) nnodes=$2 ;;
    --nproc_per_node) nproc=$2 ;;
    --rdzv_endpoint) endpoint=$2 ;;
    --rdzv_id) id=$2 ;;
    --node_rank) node_rank=$2 ;;
    --max_restarts) max_restarts=$2 ;;
    esac
    shift 2
done

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
[ -n "$nproc" ] || nproc=$("$PYTHON" -c "import torch; print(torch.cuda.device_count() or 1)") || exit
for value in "$nnodes" "$nproc"; do
    [[ $value =~ ^[1-9][0-9]*$ ]] || refuse "--nnodes and --nproc_per_node should be at least 1, not '$value'."
done
[[ $max_restarts =~ ^[0-9]+$ ]] || refuse "--max_restarts should be a number, not '$max_restarts'."
if [ "$nnodes" = 1 ]; then
    meet=(--standalone)
else
    [[ $endpoint =~ ^.+:[0-9]+$ ]] || refuse "--nnodes $nnodes needs --rdzv_endpoint host:port, the same on every node."
    meet=(--nnodes "$nnodes" --rdzv_backend c10d --rdzv_endpoint "$endpoint" --rdzv_id "$id")
    [ -z "$node_rank" ] || meet+=(--rdzv_conf "is_host=$([ "$node_rank" = 0 ] && echo 1 || echo 0)")
fi

# What workers tell this script: starting-<rank>, then worker-<rank>, its process group while it lives, under the second
# name once a signal does not end it any more; left-<rank>, that it exited with 75; refused-<rank>, that it exited with 2.
told=$(mktemp -d)
trap 'rm -rf "$told"' EXIT

# Python, told to hold signals back until pretrain.py has imported all that it needs, and hears them.
hold='import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
os.rename(*sys.argv[1:3])
os.execv(sys.executable, [sys.executable, *sys.argv[3:]])'

# One worker: pretrain.py, whose exit code torchrun must not take for a failure where it is none.
worker() {
    local starting=$told/starting-$LOCAL_RANK me=$told/worker-$LOCAL_RANK code
    ! compgen -G "$told/refused-*" >/dev/null || exit 2 # started again, it would be refused again
    trap : TERM INT USR1 HUP # meant for pretrain.py, which is in the same process group
    echo $$ >"$starting"
    "$PYTHON" -c "$hold" "$starting" "$me" pretrain.py --nnodes "$nnodes" --devices "$nproc" "$@"
    code=$?
    rm -f "$starting" "$me"
    case $code in
    75) : >"$told/left-$LOCAL_RANK" && exit 0 ;;
    2) : >"$told/refused-$LOCAL_RANK" ;;
    esac
    if [ $code = 2 ] && [ "$nnodes" = 1 ]; then # where all were refused, their own words are enough without torchrun's
        for _ in $(seq 50); do
            [ "$(compgen -G "$told/refused-*" | wc -l)" != "$nproc" ] || exit 0
            sleep 0.1
        done
    fi
    exit $code
}
export -f worker
export told hold PYTHON nnodes nproc OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

signals=0 agent=''
to_workers() { # signal, worker or starting
    local file
    for file in "$told/$2"-*; do [ ! -e "$file" ] || kill -s "$1" -- "-$(cat "$file")" 2>/dev/null; done
}
pass_on() { # signal
    signals=$((signals + 1))
    if [ $signals = 1 ] && compgen -G "$told/worker-*" >/dev/null; then
        echo "SIG$1: passed on to the workers, which save and leave." >&2
        to_workers "$1" worker
    else # the second, or none is there yet
        to_workers "$1" worker
        [ -z "$agent" ] || kill -s KILL "$agent" 2>/dev/null
    fi
}
watch() { # agent: a worker that hangs too deep to leave with the others is not waited for
    local seconds=0
    while kill -0 "$1" 2>/dev/null; do
        if [ $seconds = 60 ]; then
            echo "a worker of this machine had not ended 60 seconds after another left: killed." >&2
            kill -s KILL "$1"
            break
        fi
        sleep 1
        ! compgen -G "$told/left-*" >/dev/null || seconds=$((seconds + 1))
    done
}
trap 'pass_on TERM' TERM HUP # the latter when the terminal goes, unless nohup has this script ignore it
trap 'pass_on INT' INT
trap 'pass_on USR1' USR1

while :; do
    rm -f "$told"/*
    # in a session of its own: a Ctrl-C at the terminal is for this script to pass on
    setsid "$PYTHON" -m torch.distributed.run "${meet[@]}" --nproc_per_node "$nproc" --max_restarts "$max_restarts" \
        --no-python bash -c 'worker "$@"' worker "$@" &
    agent=$!
    watch "$agent" &
    wait "$agent"
    code=$?
    while kill -0 "$agent" 2>/dev/null; do wait "$agent" && code=0 || code=$?; done # a signal ends a wait early
    to_workers KILL worker # those of a torchrun that was itself killed
    to_workers KILL starting

    if compgen -G "$told/left-*" >/dev/null; then
        code=75
    elif compgen -G "$told/refused-*" >/dev/null; then
        code=2
    fi
    case $code in
    0 | 2) exit $code ;;
    75) told_user="left early" ;;
    *) told_user="torchrun ended with exit code $code" ;;
    esac
    if [ -z "$restart" ] || [ $signals -gt 0 ]; then
        echo "$told_user (exit code $code). The same command goes on from the newest checkpoint." >&2
        exit $code
    fi
    echo "$told_user: starting again (--restart)." >&2
    sleep 5
done
