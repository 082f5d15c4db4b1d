#!/usr/bin/env bash
# What `make demo` runs: text -> tokens -> train at tp 2 x pp 2 x dp 2 -> stop -> resume at pp 2 x dp 4 -> pictures -> text.
set -euo pipefail
export PATH="$BIN:$PATH"
[ -t 1 ] && export HPCPAR_LIVE=1
run=runs/demo store=stores/demo job=jobs/demo.toml
say() { printf '\n== %s\n' "$*"; }

say "1. a tokenizer and a token store from the Python standard library's documentation and source"
stdlib=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
text=()
for part in pydoc_data asyncio collections concurrent ctypes email encodings html http importlib json logging \
            multiprocessing unittest urllib xml xmlrpc; do
  [ -d "$stdlib/$part" ] && text+=("$stdlib/$part")
done
hpcpar data build "${text[@]}" --out $store --vocab 2048
rm -rf $run

say "2. training on 8 ranks: tp 2 x pp 2 x dp 2; after step 120 somebody creates $run/STOP"
( until [ "$(cat $run/metrics.jsonl 2>/dev/null | grep -c '"loss"')" -ge 120 ]; do sleep 0.5; done; touch $run/STOP ) &
code=0
mpirun -n 8 hpcpar train $job || code=$?
wait
[ "$code" = 75 ] || { echo "expected a clean stop (exit code 75), got $code" >&2; exit 1; }

say "3. the same run goes on at another layout: tp 1 x pp 2 x dp 4, from the same HDF5 checkpoint"
mpirun -n 8 hpcpar train $job --layout.tp 1 --train.microbatch 2

say "4. pictures of the loss and of the pipeline as it was measured"
hpcpar show $run --plot

say "5. what it has learned"
hpcpar generate $run $'def read(self, size):\n    """Return' --tokens 80
python - <<'END'
import json, math
lines = [json.loads(text) for text in open("runs/demo/metrics.jsonl")]
losses = [line["loss"] for line in lines if "loss" in line]
first, last = losses[0], sum(losses[-10:]) / 10
print(f"\nloss {first:.2f} (ln 2048 = {math.log(2048):.2f}) -> {last:.2f}: {last / math.log(2048):.0%}")
assert last < 0.6 * math.log(2048), "the loss should fall below 60% of ln(vocabulary)"
END
