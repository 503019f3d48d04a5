#!/usr/bin/env bash
# What a rented pod runs. Everything that lasts is on its volume, so another pod goes on where this one ended.
#
#   CONFIG     the YAML file, relative to the volume; without it the pod stays and waits for you
#   ROLE       download: fill the volume, on a machine without a GPU; train (default): wait for that, and train
#   VOLUME     where the volume is; default /workspace
#   WAIT       minutes that ROLE=train waits for the files; 0 (default): it downloads what is missing itself
#   WHEN_DONE  a command for the end, good or bad, but not for a pod that was told to stop, such as
#              'runpodctl remove pod $RUNPOD_POD_ID': files on a network volume stay
set -euo pipefail

VOLUME=${VOLUME:-/workspace}
export HF_HOME=${HF_HOME:-$VOLUME/huggingface} XDG_CACHE_HOME=${XDG_CACHE_HOME:-$VOLUME/cache}
cd "$VOLUME"

say() { printf '%s %s\n' "$(date -u +%FT%TZ)" "$*"; }

# So that the LoRA can be fetched by scp. RunPod sets PUBLIC_KEY.
if [ -n "${PUBLIC_KEY:-}" ] && command -v sshd >/dev/null && [ "$(id -u)" = 0 ]; then
  home=$(getent passwd root | cut -d: -f6) # sshd looks there, whatever HOME is
  mkdir -p "$home/.ssh" /run/sshd
  printf '%s\n' "$PUBLIC_KEY" >>"$home/.ssh/authorized_keys"
  chmod -R go-rwx "$home/.ssh"
  ssh-keygen -A >/dev/null
  "$(command -v sshd)"
fi

child=
told=
# As process 1 of a container this shell is the one that is told to stop, and has to pass it on.
trap 'told=yes; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' TERM INT

run() { # runs "$@" to its end, and leaves its status in $code
  say "$*"
  "$@" &
  child=$!
  [ -z "$told" ] || kill -TERM "$child" 2>/dev/null || true # it came before there was a child to tell
  code=0
  wait "$child" || code=$?
  while [ -n "$told" ] && kill -0 "$child" 2>/dev/null; do
    code=0
    wait "$child" || code=$?
  done
  child=
}

code=0
if [ -z "${CONFIG:-}" ]; then
  say "no CONFIG is set: waiting; zimage-train is on the path, and the volume is $VOLUME"
elif [ "${ROLE:-train}" = download ]; then
  run zimage-train download "$CONFIG"
elif [ "${ROLE:-train}" = train ]; then
  if [ "${WAIT:-0}" != 0 ]; then
    run zimage-train download "$CONFIG" --wait "$WAIT"
  fi
  [ "$code" != 0 ] || [ -n "$told" ] || run zimage-train train "$CONFIG"
else
  say "ROLE is $ROLE; it is download or train"
  code=2
fi
[ -z "$told" ] || exit "$code"

say "ended with $code"
if [ -n "${WHEN_DONE:-}" ]; then
  say "$WHEN_DONE"
  bash -c "$WHEN_DONE" || say "that ended with $?"
  exit "$code"
fi
say "nothing is to follow (WHEN_DONE); waiting, so that you can look and fetch. This costs what a pod costs"
run sleep infinity
exit "$code"
