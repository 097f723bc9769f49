#!/usr/bin/env bash
# What is worth knowing of a GPU or a TPU, in at most 8 minutes:
#
#     bash benchmarks/on_device.sh FOLDER [--config.key=value of cifar10 ...]
#
# FOLDER gets the runs, a log of each part and on_device.json; a summary is printed. The exit code is 1
# where a part failed.
set -u
[ $# -gt 0 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
shift
cd "$(dirname "$0")/.."
# What an earlier start left.
rm -rf "$out"/{digits,cifar10,resumed,two,parts.tsv,{train_step,on_device}.json}
rm -f "$out"/{digits,cifar10,resumed,stopped,train_step,tests,two_processes}.log
deadline=$((SECONDS + 465))
device='import jax; print(jax.default_backend(), jax.device_count())'
read -r backend devices <<< "$(timeout 60 python -c "$device" | tail -1)"
[ -n "$backend" ] || { echo "error: JAX cannot start here" >&2; exit 1; }

# part NAME SECONDS COMMAND...: notes the exit code (124: it took too long) and the seconds.
part() {
    local name=$1 limit=$2 begin=$SECONDS left=$((deadline - SECONDS)) code=124
    shift 2
    [ "$limit" -le "$left" ] || limit=$left
    echo "== $name: $*"
    if [ "$limit" -gt 5 ]; then
        timeout --kill-after=5 "$limit" "$@" > "$out/$name.log" 2>&1
        code=$?
    fi
    printf '%s\t%s\t%s\n' "$name" "$code" $((SECONDS - begin)) | tee -a "$out/parts.tsv"
}

digits=(python main.py --config=configs/digits.py --config.model.dtype=bfloat16)
two() {
    local shared=(--workdir="$out/two" --coordinator_address=localhost:12321 --num_processes=2)
    CUDA_VISIBLE_DEVICES=0 "${digits[@]}" "${shared[@]}" --process_id=0 --config.train.epochs=5 &
    CUDA_VISIBLE_DEVICES=1 "${digits[@]}" "${shared[@]}" --process_id=1 --config.train.epochs=5
    local code=$?
    wait $! && return $code
}
stopped() {  # SIGTERM in the middle, then the same command
    local command=("${digits[@]}" --workdir="$out/resumed" --config.train.log_every_steps=5)
    "${command[@]}" > "$out/stopped.log" 2>&1 &
    local process=$!
    until grep -q '^step ' "$out/stopped.log"; do
        kill -0 $process || return 1
        sleep 0.2
    done
    kill -TERM $process
    wait $process
    [ $? -eq 143 ] || return 1
    "${command[@]}" || return 1
    if [ ! -e "$out/digits/results.json" ]; then
        echo "there is no run that was not stopped"
    elif cmp -s {"$out/resumed","$out/digits"}/predictions.npz; then
        echo "the same bits as the run that was not stopped"
    else
        echo "other bits than the run that was not stopped"
    fi
}
export -f two stopped
export out digits_command="${digits[*]}"

part digits 100 "${digits[@]}" --workdir="$out/digits" --config.train.log_every_steps=5
part cifar10 170 python main.py --config=configs/cifar10.py --workdir="$out/cifar10" \
    --config.model.dtype=bfloat16 --config.train.batch_size=512 --config.train.epochs=2 \
    --config.train.small_epochs=1 "$@"
part resumed 90 bash -c 'read -ra digits <<< "$digits_command"; stopped'
part train_step 100 env IMGCLS_RESULTS="$out" python benchmarks/train_step.py --network cifar10 \
    --repetitions 2
part tests 60 python -m pytest -q -n 0 tests/test_accelerators.py tests/test_platforms.py
# A TPU is one process's.
if [ "$backend" = cpu ] || { [ "$backend" = gpu ] && [ "$devices" -gt 1 ]; }; then
    part two_processes 60 bash -c 'read -ra digits <<< "$digits_command"; two'
fi

python - "$out" << 'END'
import json, pathlib, sys

out, summary = pathlib.Path(sys.argv[1]), {}
for line in (out / "parts.tsv").read_text().splitlines():
    name, code, seconds = line.split("\t")
    text = (out / f"{name}.log").read_text(errors="replace") if (out / f"{name}.log").exists() else ""
    part = {"exit_code": int(code), "seconds": int(seconds), "last_lines": text.splitlines()[-9:]}
    if (results := out / name / "results.json").exists():
        found = json.loads(results.read_text())
        keys = ("device", "versions", "git_commit", "top1", "images_per_second", "seconds")
        part["results"] = {key: found.get(key) for key in keys}
    if (figures := out / f"{name}.json").exists():
        part["figures"] = json.loads(figures.read_text())
    summary[name] = part
(out / "on_device.json").write_text(json.dumps(summary, indent=2))
for name, part in summary.items():
    figures = part.get("results", {})
    told = [f"{key} {figures[key]}" for key in ("top1", "images_per_second") if key in figures]
    told = told or [line.strip() for line in part["last_lines"][-1:]]
    print(f"{name}: exit code {part['exit_code']}, {part['seconds']} s, {', '.join(told)}")
print(f"written: {out / 'on_device.json'}")
sys.exit(any(part["exit_code"] for part in summary.values()))
END
