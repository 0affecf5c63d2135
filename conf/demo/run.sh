#!/usr/bin/env bash
# The whole road on a laptop: a small English model is taken to Chinese, published as a delta, and measured.
# Run from the project's root (make demo). Each command finds its own work done, or goes on after a kill.
set -euo pipefail
BASE=smollm2-135m
RUNS=runs/demo
HELDOUT=pandallm/demo/heldout

if [ -f $RUNS/report.html ] && [ -z "$(find conf/demo pandallm -newer $RUNS/report.html -type f ! -name '*.pyc' -print -quit)" ]; then
  echo "Everything is done already: $RUNS/report.html" && exit 0
fi

stage() { # stage NAME COMMAND...: runs it and keeps the time of the run that finished it
  echo "== $1: ${*:2}" >&2
  local began=$SECONDS
  "${@:2}"
  mkdir -p $RUNS/times && [ -f "$RUNS/times/$1" ] || echo $((SECONDS - began)) > "$RUNS/times/$1"
}
evaluate() { # evaluate MODEL OUT
  panda eval --model "$1" --task c3-d,c3-m,logiqa-v2 --data pandallm/demo/eval --split dev --protocol choice,generate \
    --text $HELDOUT/wiki_zh.jsonl --text $HELDOUT/wiki_zh_hant.jsonl --text $HELDOUT/news_zh.jsonl --out "$2"
}
verify() { panda delta verify --base $BASE --delta $RUNS/delta --tuned $RUNS/model --json > $RUNS/delta_verify.json; }
chat() { # chat MODEL OUT: a few questions
  [ -f "$2" ] || { panda chat "$1" --temperature 0 --repetition-penalty 1.05 --max-new-tokens 80 < conf/demo/questions.txt > "$2.partial" && mv "$2.partial" "$2"; }
}

# 1. Corpora become packed token shards.
stage prepare-pretrain  panda data prepare conf/demo/pretrain_data.yaml
stage prepare-sft       panda data prepare conf/demo/sft_data.yaml

# 2. Continued pretraining, then instruction tuning from its result.
stage pretrain          panda train conf/demo/pretrain.yaml
stage sft               panda train conf/demo/sft.yaml

# 3. The tuned model is published as a delta; a user applies it to the base and gets the same bits.
stage delta-make        panda delta make --base $BASE --tuned $RUNS/sft/model --delta $RUNS/delta
stage delta-apply       panda delta apply --base $BASE --delta $RUNS/delta --out $RUNS/model
stage delta-verify      verify

# 4. Before and after: accuracy, bits per character, sample answers.
stage evaluate-before   evaluate $BASE $RUNS/eval/before
stage evaluate-after    evaluate $RUNS/model $RUNS/eval/after
stage compare           panda eval compare $RUNS/eval/before $RUNS/eval/after
stage chat-before       chat $BASE $RUNS/chat_before.txt
stage chat-after        chat $RUNS/model $RUNS/chat_after.txt

# 5. One page of it all.
panda demo-report $RUNS
