# What the scenarios share. Sourced by a shell with -eu; a failed check says why on a line that begins with `WHY: `.

key=/etc/vault.key
socket=/run/daxcrypt.sock

fail() {
  echo "WHY: $*"
  exit 1
}

# expect_failure COMMAND...: it must not succeed.
expect_failure() { if "$@"; then fail "succeeded: $*"; fi; }

# wait_for COMMAND...: at most 60 s.
wait_for() {
  tries=0
  until "$@"; do
    tries=$((tries + 1))
    [ $tries -lt 600 ] || fail "waited in vain for: $*"
    sleep 0.1
  done
}

# sleep_up_to MILLISECONDS, at random.
sleep_up_to() {
  random=$(($(od -An -N 4 -t u4 /dev/urandom) % $1))
  sleep "$((random / 1000)).$(printf %03d $((random % 1000)))"
}

format() { daxcrypt format "$@" --key-file $key; }

# serve ARGUMENTS...: in the background, until it can be connected to.
serve() {
  rm -f $socket
  daxcrypt serve "$@" --key-file $key --socket $socket &
  server=$!
  wait_for test -S $socket
}

# Ends the server as systemd would, and takes its exit status for a verdict.
stop_server() {
  kill "$server"
  wait "$server" || fail "the server ended with $?"
}

has_size() { [ "$(cat "/sys/block/${1#/dev/}/size")" != 0 ]; }
is_free() { [ ! -e "/sys/block/${1#/dev/}/pid" ]; }

attach() {
  nbd-client -unix $socket "$@"
  for word in "$@"; do case $word in /dev/nbd*) wait_for has_size "$word" ;; esac; done
}

# tools/nbd-attach, which runs until the device is detached.
nbd_attach() { PYTHONHOME=/usr python3 -s -S /scenarios/nbd-attach "$@"; }
# start_attacher SERVER DEVICE OPTIONS...: in the background, until the device is there.
start_attacher() {
  nbd_attach "$@" >/run/attach.out 2>&1 &
  attacher=$!
  wait_for attacher_ended_or_has_size "$2"
  kill -0 $attacher || fail "nbd-attach: $(tail -n 1 /run/attach.out)"
}
attacher_ended_or_has_size() { has_size "$1" || ! kill -0 $attacher; }
stop_attacher() {
  nbd_attach --detach "$1"
  wait $attacher || fail "nbd-attach: $(tail -n 1 /run/attach.out)"
}

detach() {
  nbd-client -d "$1"
  wait_for is_free "$1"
}

# A tree of files of many sizes, none a multiple of a block, with its checksums in /run/sums.NAME.
write_tree() {
  mkdir -p "$1/tree.$2/deep/er"
  for size in 1 16 511 513 4097; do head -c $size /dev/urandom >"$1/tree.$2/$size"; done
  for size in 15 17 512 4095 65537; do head -c $size /dev/urandom >"$1/tree.$2/deep/er/$size"; done
  head -c 700000 /dev/urandom >"$1/tree.$2/large"
  ln -s large "$1/tree.$2/link"
  (cd "$1" && find "tree.$2" -type f -exec sha256sum {} + >"/run/sums.$2")
}

# verify_tree PLACE NAME...: reads back from the device, not from the page cache.
verify_tree() {
  place=$1
  shift
  sync
  echo 3 >/proc/sys/vm/drop_caches
  for tree in "$@"; do cat "/run/sums.$tree"; done >/run/sums
  (cd "$place" && sha256sum -c /run/sums >/run/verify.out 2>&1) || fail "checksums differ: $(grep -v ': OK' /run/verify.out | head -n 3 | tr '\n' ' ')"
}

make_ext4() { mkfs.ext4 -q -b 4096 -J size=4 "$1"; }
# What is smaller than 300 MB is called unsupported by mkfs, not by the kernel; its log is what takes time here.
make_xfs() { mkfs.xfs -q --unsupported "$1" 2>/dev/null; }
check_ext4() { e2fsck -fn "$1" || fail "e2fsck on $1: exit $?"; }
check_xfs() { xfs_repair -n "$1" || fail "xfs_repair on $1: exit $?"; }

mark() { echo "<6>daxcrypt-guest: mark" >/dev/kmsg; }

since_mark() { dmesg "$@" | awk '/daxcrypt-guest: mark/ { n = 0; next } { line[++n] = $0 } END { for (i = 1; i <= n; i++) print line[i] }'; }

# Lines since the mark that are warnings or worse, or speak of errors; $1 is a pattern of lines that are expected.
complaints() {
  since_mark -r | awk -v expected="${1:-}" '
    {
      level = $0; sub(/^</, "", level); sub(/>.*/, "", level)
      if (level % 8 > 4 && $0 !~ /I\/O error|[Cc]orrupt|EXT4-fs error|timed out|Oops|BUG:/) next
      # The driver reports an ordinary disconnect as an error.
      if ($0 ~ /nbd[0-9]+: (shutting down sockets|Receive control failed|NBD_DISCONNECT|Disconnected due to user request)/) next
      # The emulated machine is slow and shares its processors: its clocks say so.
      if ($0 ~ /hrtimer: interrupt took|clocksource: |sched: RT throttling|perf: interrupt took/) next
      if ($0 ~ /DAX enabled. Warning: EXPERIMENTAL/) next
      # A count of lines that were left out says nothing by itself.
      if ($0 ~ /(print_req_error|io_error): [0-9]+ callbacks suppressed/) next
      if (expected != "" && $0 ~ expected) next
      print
    }'
}

kernel_is_quiet() {
  complaints "${1:-}" >/run/complaints
  [ ! -s /run/complaints ] || { cat /run/complaints; fail "the kernel complained: $(head -n 1 /run/complaints)"; }
}

# Undoes whatever a scenario that failed has left.
clean_up() {
  rm -f /run/wanted
  swapoff -a || true
  for try in 1 2 3; do
    for place in $(awk '$2 ~ "^/mnt/" { print $2 }' /proc/mounts); do umount "$place" || umount -l "$place"; done
  done
  killall nbd-client python3 || true
  for device in 0 1 2; do nbd-client -d /dev/nbd$device || true; done
  killall daxcrypt || true
  sleep 0.3
  dmsetup remove_all || true
  losetup -D || true
  rm -f /run/*.img /run/*.sock
}
