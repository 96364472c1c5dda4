#!/usr/bin/env bash
# A 4-bit ResNet-20 learns three tasks of digits, without protection (original) and with LifeQuant (ours).
# Usage: bash scripts/quickstart.sh [--seed N]
# Runs that are finished are not trained again, so a second call prints the tables at once.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

seed=0
while [ $# -gt 0 ]; do
    case $1 in
        --seed=*) seed=${1#*=} ;;
        --seed)
            seed=${2-}
            shift
            ;;
        -h | --help)
            sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}"
            exit
            ;;
        *) fail "unknown argument $1 (usage: bash scripts/quickstart.sh [--seed N])" ;;
    esac
    [ $# -eq 0 ] || shift
done
[[ $seed =~ ^[0-9]{1,9}$ ]] || fail "--seed '$seed': not a whole number of at least 0"

use_environment
cd "$top"
out=experiment/quickstart
[ "$seed" -eq 0 ] || out=experiment/quickstart_seed$seed

heading() {
    printf '\n== %s\n' "$*"
}

train() {
    "$python" resnet-20-cifar-10/main.py --csv_dir "$out/csv" --seed "$seed" --num_epochs 12 --train_batch_size 64 \
        --resume "$@" || {
        local code=$?
        [ $code -ne 2 ] || echo "(to begin anew, delete $out)" >&2
        exit $code
    }
}

heading "images: scikit-learn's handwritten digits"
"$python" lifelong_data_generation/prepare_images.py --dataset digits --out data_dir/digits

heading "three tasks; each has other digits"
for source in train test; do
    "$python" lifelong_data_generation/lifeLongDataGeneator.py --data_dir data_dir/digits --output_csv digits.csv \
        --num_tasks 3 --diminish_rate 100 --source "$source" --seed "$seed" --output_dir "$out/csv"
done

heading "a 32-bit network, trained on task 0"
train --method original --bitW 32 --num_tasks 1 --job_dir "$out/pretrained"

for method in original ours; do
    heading "$method: 4 bits, task after task"
    train --method "$method" --bitW 4 --source_file "$out/pretrained/model_best.pt" --job_dir "$out/$method"
done

heading "comparison"
"$python" scripts/compare.py "$out/original" "$out/ours"

heading "curves"
echo "$(dirname "$python")/tensorboard --logdir $top/$out"
